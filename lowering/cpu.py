"""The CPU target."""

from .generic import backward, forward as _forward


def forward(*args, save):  # placeholder until the kernel lands
    return _forward(*args)
