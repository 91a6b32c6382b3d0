"""Recover: from elements in normal form to the meaning of a block (`moe_compile.ir`) and its boundary in the graph."""
