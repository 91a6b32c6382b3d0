"""A catalogue of tiny modules, one per spelling of a Mixture-of-Experts block, each with its verdict in the docstring."""

from __future__ import annotations

import inspect
from types import ModuleType

import torch

from . import (
    adapters,
    base,
    chains,
    combine,
    constant_near_misses,
    dispatch,
    exact,
    expert_near_misses,
    groups,
    ids,
    indexed,
    loops,
    loops_remote,
    lora,
    lora_stored,
    masked_rows,
    masks,
    near_norms,
    normalisers,
    packed,
    puts,
    quantised,
    reached,
    redundant,
    rounded,
    router_near_misses,
    routers,
    sentinels,
    serving,
    shared,
    sigmoids,
    smooth,
    spelled,
    stored,
    tokens,
    told,
    weights,
    written_parts,
)
from .base import AsWritten, Case, Fused, Rejected, Sound, Untouched

FILES: tuple[ModuleType, ...] = (
    routers,
    normalisers,
    sigmoids,
    groups,
    router_near_misses,
    written_parts,
    near_norms,
    loops,
    loops_remote,
    masked_rows,
    masks,
    puts,
    dispatch,
    tokens,
    weights,
    lora,
    adapters,
    chains,
    quantised,
    spelled,
    stored,
    lora_stored,
    rounded,
    smooth,
    packed,
    indexed,
    reached,
    redundant,
    combine,
    shared,
    serving,
    sentinels,
    expert_near_misses,
    constant_near_misses,
    exact,
    ids,
    told,
)


def entries() -> dict[str, type[Case]]:
    """Every entry by name, in the order of the files."""
    found: dict[str, type[Case]] = {}
    for module in FILES:
        for name, cls in vars(module).items():
            if inspect.isclass(cls) and issubclass(cls, Case) and cls.__module__ == module.__name__ and not name.startswith("_"):
                if not hasattr(cls, "expect"):
                    continue
                assert name not in found, f"two entries named {name}"
                found[name] = cls
    return found


def build(cls: type[Case], seed: int = 0) -> Case:
    """The entry with reproducible random parameters, in its dtype."""
    torch.manual_seed(seed)
    return cls().to(cls.dtype)


__all__ = ["AsWritten", "Case", "Fused", "Rejected", "Sound", "Untouched", "base", "build", "entries"]
