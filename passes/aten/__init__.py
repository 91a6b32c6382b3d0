"""ATen: what one element of each op is, who writes which memory, and the shadow graph that is read."""
