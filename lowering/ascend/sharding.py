"""What FSDP2 does with expert weights, for what the report has to say about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .weights import Recipe


@dataclass(frozen=True)
class Sharding:
    """A parameter is cut along `dim` into `ranks` pieces."""

    dim: int
    ranks: int


def of(t: Tensor) -> Sharding | None:
    """How FSDP2 shards the parameter that it has gathered into `t`, or None: not at all, or not known.

    torch tells nobody: its own registry of composable states is asked where it is there.
    """
    for p in _parameters():
        if getattr(p, "_unsharded_param", None) is t:
            dim, ranks = getattr(getattr(p, "fsdp_placement", None), "dim", None), getattr(p.mesh_info, "shard_mesh_size", None)
            return Sharding(dim, ranks) if isinstance(dim, int) and isinstance(ranks, int) else None
    return None


def _parameters() -> Iterator[Any]:
    try:
        from torch.distributed._composable_state import _module_state_mapping as states
    except ImportError:
        return
    for ref in list(states.values()):
        state = ref()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            yield from getattr(group, "fsdp_params", ())


def notes(recipe: Recipe, tensors: Sequence[Tensor]) -> list[str]:
    """What to say of a packed weight of training that is made of these parameters."""
    sharding = of(tensors[0]) if recipe.stacked else None
    if sharding is None:
        return []
    shape, axis = _packed(recipe, tensors[0], sharding.dim)
    told = None if len(shape) != 3 or axis is None else advice(shape, Sharding(axis, sharding.ranks))
    return [] if told is None else [told]


def _packed(recipe: Recipe, t: Tensor, dim: int) -> tuple[tuple[int, ...], int | None]:
    """The packed operand's shape, and which of its dims is the parameter's `dim`: told by strides, which views keep."""
    plain = torch.empty_strided(t.shape, t.stride(), device="meta", dtype=t.dtype)
    made = recipe.view([plain])
    same = [i for i, (n, step) in enumerate(zip(made.shape, made.stride())) if step == plain.stride(dim) and n == plain.shape[dim]]
    return tuple(made.shape), same[0] if len(same) == 1 else None


def advice(shape: tuple[int, ...], sharding: Sharding) -> str | None:
    """What to say of a weight [E, in, out] that is sharded so: a shard of inputs or outputs wants whole blocks of 512 channels.

    What counts is the shard, not the weight. Shards of whole experts are always fine.
    """
    if sharding.dim == 0 or sharding.ranks == 1:
        return None
    size, what = shape[sharding.dim], ("inputs", "outputs")[sharding.dim - 1]
    share, rest = divmod(size, sharding.ranks)
    cut = f"expert weights {list(shape)} are sharded along their {what}: {size} over {sharding.ranks} ranks"
    if rest or share % 16:
        return f"{cut} are no whole blocks of 16, which the fractal format wants; shard along the experts, or over fewer ranks"
    if share % 512:
        return f"{cut} are {share} each, multiples of 512 are recommended; shard the experts' modules (MLP) alone, along the experts"
    return None
