"""Loops: data-dependent expert loops read by example before Dynamo would break the graph on them."""
