"""The ops in plain torch, on any device: what runs where a target has no kernel, and what kernels are held against."""
