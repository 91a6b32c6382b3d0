"""Rewrite: a plan as data, located in the Dynamo graph, carried out, kept on disk."""
