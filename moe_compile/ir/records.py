"""What the ops are told of the IR in plain numbers: the one list of an op's plain arguments, in their order (`codec` makes the rest)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import Form, Rows, Stored, storage
from .chain import Chain, Kind, decode
from .scalar import G
from .storage import Storing

_PROGRAM = {"act_ops": "activation", "act_consts": "activation"}


@dataclass(frozen=True)
class Routing:
    """Of a `Gating`, for `route` and its kin."""

    AT: ClassVar = {
        "bias_on": "bias",
        "n_groups": "groups.count",
        "kept_groups": "groups.kept",
        "group_top": "groups.top",
        "group_fill": "groups.fill",
        "norm": "norm.kind",
        "norm_eps": "norm.eps",
        "norm_clamp": "norm.clamp_min",
        "norm_p": "norm.p",
    }
    ABSENT: ClassVar = {"group_fill": -math.inf, "norm_p": 1.0}

    k: int
    score: int
    score_over_selected: bool
    bias_on: int
    bias_in_weights: bool
    n_groups: int
    kept_groups: int
    group_top: int
    group_fill: float
    norm: int
    norm_eps: float
    norm_clamp: float
    norm_p: float
    scale: float
    score_dtype: torch.dtype
    weight_dtype: torch.dtype


@dataclass(frozen=True)
class Layout:
    """Of the experts, for `experts` and its kin."""

    AT: ClassVar = _PROGRAM

    act_ops: tuple[int, ...]
    act_consts: tuple[float, ...]
    form: int
    num_experts: int
    stacked: bool
    up_transposed: bool
    down_transposed: bool
    weight_on_input: bool
    num_identity: int

    @property
    def gated(self) -> bool:
        return self.form != Form.SINGLE

    def halves(self) -> int:
        """How many tensors (or lists) hold the up projection."""
        return 2 if self.form == Form.SEPARATE else 1

    def at(self, tensors: Sequence[Tensor], part: int, e: int) -> Tensor:
        """Expert e's matrix or bias of one part, as stored."""
        return tensors[part][e] if self.stacked else tensors[part * self.num_experts + e]

    def intermediate(self, down: Sequence[Tensor]) -> int:
        return down[0].shape[-2 if self.down_transposed else -1]

    def out_features(self, down: Sequence[Tensor]) -> int:
        return down[0].shape[-1 if self.down_transposed else -2]

    def pre_width(self, down: Sequence[Tensor]) -> int:
        """Columns of the saved pre-activations: [g | u], or g alone."""
        return self.intermediate(down) * (2 if self.gated else 1)

    def pair(self, name: str, part: int) -> float:
        """s of the low-rank pair of a part of `up` or of `down`; 0 where there is none."""
        return 0.0

    def pairs_before(self, name: str, part: int) -> int:
        """How many parts before this one have a pair."""
        return sum(bool(self.pair(name, i)) for i in range(part))

    def by_expert(self, tensors: Sequence[Tensor], part: int) -> Sequence[Tensor]:
        """One part's matrices or biases, as stored, by expert."""
        each = self.num_experts
        return tensors[part] if self.stacked else tensors[part * each : (part + 1) * each]  # type: ignore[return-value]


@dataclass(frozen=True)
class AdaptedLayout(Layout):
    """Of experts with low-rank pairs, for `experts_adapted` and its kin."""

    up_pair: float
    second_pair: float
    down_pair: float

    def pair(self, name: str, part: int) -> float:
        return self.down_pair if name == "down" else (self.up_pair, self.second_pair)[part]


@dataclass(frozen=True)
class ChainedLayout:
    """Of experts that are a chain, for `experts_chained` and its kin."""

    AT: ClassVar = {"chain_ints": "chain", "chain_consts": "chain"}

    chain_ints: tuple[int, ...]
    chain_consts: tuple[float, ...]
    num_experts: int
    num_identity: int

    @cached_property
    def chain(self) -> Chain:
        return decode(self.chain_ints, self.chain_consts)

    @property
    def others(self) -> dict[str, Any]:
        """Fields of `Experts` that follow from the chain."""
        widths = [s.width for s in self.chain.stages]
        first = next((s.width for s in self.chain.stages if s.matrices), widths[0])
        stacked = Kind.LISTED not in self.chain.kinds
        return {"intermediate": first, "out_features": widths[-1], "form": Form.SINGLE, "activation": G, "stacked": stacked}


@dataclass(frozen=True)
class Storage:
    """Of experts whose weights are no plain floats, and of what is done to their rows, for `experts_stored`."""

    AT: ClassVar = {"storage_ints": "storage", "storage_consts": "storage"}

    storage_ints: tuple[int, ...]
    storage_consts: tuple[float, ...]

    @cached_property
    def storing(self) -> Storing:
        return storage.decode(self.storage_ints, self.storage_consts)

    def stored(self) -> tuple[Stored | None, Stored | None]:
        """Of the up projection and of the down projection."""
        return self.storing.up, self.storing.down

    def rows(self) -> tuple[Rows | None, Rows | None]:
        """What is done to rows before the up projection and before the down projection."""
        return self.storing.up_rows, self.storing.down_rows


@dataclass(frozen=True)
class SharedLayout:
    """Of the shared expert, as an `Experts` of one, for `experts_shared`."""

    AT: ClassVar = _PROGRAM

    act_ops: tuple[int, ...]
    act_consts: tuple[float, ...]
    form: int
    up_transposed: bool
    down_transposed: bool
