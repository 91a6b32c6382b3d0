"""Which family of devices an NPU belongs to: limits of some ops differ."""

from __future__ import annotations

import functools

import torch

# a part of the name that the device gives itself -> family; the first that fits
_FAMILIES = (("310P", "310P"), ("910_95", "950"), ("950", "950"), ("910_93", "A3"), ("910B", "A2"))


@functools.cache
def family() -> str:
    """ "310P", "A2", "A3", "950", or "" where there is no NPU, or one that is not known."""
    npu = getattr(torch, "npu", None)
    if npu is None or not npu.is_available():
        return ""
    return of_name(str(npu.get_device_name(0)))


def of_name(name: str) -> str:
    """The family of a device called "Ascend910B1" and the like."""
    return next((family for part, family in _FAMILIES if part in name), "")
