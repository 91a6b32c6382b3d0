"""Prove: what was recovered, and what will be emitted, run against the user's own operations on probes."""
