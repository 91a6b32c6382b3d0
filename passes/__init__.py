"""Passes: a captured graph in, MoE blocks and a rewritten graph out. `pipeline.run` is the way in."""
