"""What launching asks of the host again and again, quickly: whole numbers, and what a card is.

Triton's own `cdiv` and `next_power_of_2` serve kernels too, and cost microseconds a call; a card's properties do not change.
"""

from __future__ import annotations

import functools

import torch


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, n > 0."""
    return 1 << (n - 1).bit_length()


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA card; (0, 0) of any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else (0, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 elsewhere, for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
