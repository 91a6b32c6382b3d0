"""What the routed experts mean, and the shared one: how their parameters are stored, and the function of one expert's rows."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from . import scalar as act
from .chain import Chain
from .operands import Operands
from .rows import Rows
from .storage import Storing
from .stored import Stored


class Form(enum.IntEnum):
    """How the up projection of one expert is stored."""

    SINGLE = 0  # one matrix, no gate
    CONCAT = 1  # [g; u] along the output dim
    INTERLEAVED = 2  # g0 u0 g1 u1 ...
    SEPARATE = 3  # two tensors (stacked) or 2E tensors (list: E gates, then E ups)


class Overlap(enum.IntEnum):
    """Where the op `experts_shared` runs the shared expert."""

    SERIAL = 0  # on the main stream
    SIDE = 1  # on a side stream, beside the routed experts
    BY_TOKENS = 2  # on a side stream for few tokens


@dataclass(frozen=True)
class Experts:
    """out[t] = Σ_j w[t,j] · down[e] act(up[e] x[t]) with e = ids[t,j] - first; ids outside [first, first + E) contribute nothing.

    `first`: which expert of the router's is the first one here, where others are another device's. The ops know nothing of it: they get
    ids less it. With `num_identity` = z > 0 ids E .. E+z-1 (from `first` on) are identity experts, contributing w · x[t].
    `up_transposed`: the up weight is stored [..., in, out] instead of [..., out, in]; `down_transposed` likewise.
    `stacked`: one 3-D tensor [E, ·, ·] (two for SEPARATE), else a list of E (2E) matrices.
    `weight_on_input`: the routing weight multiplies x instead of the expert's output.
    `ids_mapped`: ids go through a table or a mask after the top-k (logical to physical experts, padding tokens).
    `up_stored`, `down_stored`: how the projection's weights lie in memory where they are no plain floats.
    `up_pair`, `second_pair`, `down_pair`: s where a low-rank pair is added to a projection as it is stored, W x + s · b (a x); 0 where
    there is none. `second_pair`: of the up projection that is stored apart from the gate (SEPARATE).
    `chain`: the function of one expert where it is more than down act(up x); its parameters are `Operands.parts`, and what is said here of
    projections says nothing. `intermediate` is the width behind its first product.
    `up_rows`, `down_rows`: how rows are rounded before the projection; None: they are not.
    """

    num_experts: int
    hidden: int
    intermediate: int
    out_features: int
    form: Form
    activation: sp.Expr
    stacked: bool = True
    up_transposed: bool = False
    down_transposed: bool = False
    up_bias: bool = False
    down_bias: bool = False
    weight_on_input: bool = False
    num_identity: int = 0
    ids_mapped: bool = False
    dtype: torch.dtype = torch.float32
    up_stored: Stored | None = None
    down_stored: Stored | None = None
    up_rows: Rows | None = None
    down_rows: Rows | None = None
    up_pair: float = 0.0
    second_pair: float = 0.0
    down_pair: float = 0.0
    chain: Chain | None = None
    first: int = 0

    @property
    def coded(self) -> bool:
        """Whether a projection's weights are no plain floats."""
        return self.up_stored is not None or self.down_stored is not None

    @property
    def rounded(self) -> bool:
        """Whether rows are rounded before a product."""
        return self.up_rows is not None or self.down_rows is not None

    @property
    def storage(self) -> Storing:
        return Storing(self.up_stored, self.down_stored, self.up_rows, self.down_rows)

    @property
    def adapted(self) -> bool:
        """Whether a projection has a low-rank pair."""
        return bool(self.up_pair or self.second_pair or self.down_pair)

    def expert(self, e: int, p: Operands[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """The matrices of one expert as [out, in]: gate, up (None for SINGLE), down; the biases and low-rank pairs or None.

        Codes become floats of `dtype`.
        """
        n = self.num_experts

        def pick(ts: Sequence[Tensor], part: int) -> Tensor | None:
            if not ts:
                return None
            return ts[part][e] if self.stacked else ts[part * n + e]

        def split(t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            if t is None or self.form is Form.SINGLE:
                return t, None
            if self.form is Form.CONCAT:
                return t[: self.intermediate], t[self.intermediate :]
            return t[0::2], t[1::2]

        def matrix(name: str, transposed: bool, part: int = 0) -> Tensor:
            t = self._stored_matrix(name, lambda ts: pick(ts, part), part, e, p, dtype)
            return t.t() if transposed else t

        up = ("up", self.up_transposed)
        if self.form is Form.SEPARATE:
            g, u = matrix(*up), matrix(*up, part=1)
            gb, ub = pick(p.up_bias, 0), pick(p.up_bias, 1)
        else:
            (g, u), (gb, ub) = split(matrix(*up)), split(pick(p.up_bias, 0))
        d, db = matrix("down", self.down_transposed), pick(p.down_bias, 0)
        first, second = self._pair(p.up_a, p.up_b, 0, e, self.up_pair), self._pair(p.up_a, p.up_b, bool(self.up_pair), e, self.second_pair)
        if self.form is not Form.SEPARATE and first is not None:
            a, b = first
            first, second = ((a, half) if half is not None else None for half in split(b))
        low = dict(gl=first, ul=second, dl=self._pair(p.down_a, p.down_b, 0, e, self.down_pair))
        smooth = dict(us=smooth_of(p.up_smooth, e), ds=smooth_of(p.down_smooth, e))
        return dict(g=g, u=u, gb=gb, ub=ub, d=d, db=db, **low, **smooth)

    def _stored_matrix(
        self, name: str, pick: Callable[[Sequence[Tensor]], Tensor | None], part: int, e: int, p: Operands[Tensor], dtype: torch.dtype
    ) -> Tensor:
        """The matrix of what `pick` takes of each parameter, as stored. An index of groups beside stacks may be one for all."""
        code, scale, zero, second = (pick(getattr(p, f"{name}{what}")) for what in ("", "_scale", "_zero", "_second"))
        how: Stored | None = getattr(self, f"{name}_stored")
        assert code is not None
        if how is None:
            return code
        tables, groups = getattr(p, f"{name}_table"), getattr(p, f"{name}_group")
        group = groups[part] if groups and self.stacked and groups[part].ndim == 1 else pick(groups)
        table = None if how.shifted else next(iter(tables), None)
        shifts = how.shifts_of(tables, part if self.stacked else part * self.num_experts + e)
        return how.matrix(code, scale, dtype, zero, table, second, group, shifts)

    def _pair(self, a: Sequence[Tensor], b: Sequence[Tensor], part: int, e: int, scale: float) -> tuple[Tensor, Tensor] | None:
        """An expert's (a [r, in], scale · b [out, r]), the `part`-th of those that are there."""
        if not scale:
            return None
        low, high = (ts[part][e] if self.stacked else ts[part * self.num_experts + e] for ts in (a, b))
        return low, scale * high

    def one(self, e: int, x: Tensor, p: Operands[Tensor]) -> Tensor:
        """Expert e on rows x [N, H] -> [N, out] in x's dtype."""
        if self.chain is not None:
            return self.chain.apply(x, self.chain.of_expert(p.parts, self.num_experts, e))
        return self.apply(x, self.expert(e, p, x.dtype))

    def apply(self, x: Tensor, m: dict[str, Any]) -> Tensor:
        """One expert's function on rows x [N, H] -> [N, H], with the matrices `expert` returned."""
        u = None if m["u"] is None else self.project(x, m, "u")
        return self.project(act.evaluate(self.activation, self.project(x, m, "g"), u), m, "d")

    def project(self, rows: Tensor, m: dict[str, Any], name: str) -> Tensor:
        """The product of rows [N, in] with the matrix `name` (g, u or d) of those that `expert` returned -> [N, out]."""
        w, b = (None if t is None else t.to(rows.dtype) for t in (m[name], m[name + "b"]))
        assert w is not None
        how, smooth = (self.down_rows, "ds") if name == "d" else (self.up_rows, "us")
        rows = rows if how is None else how.rounded(rows, m.get(smooth))
        out = F.linear(rows, w)
        if (pair := m[name + "l"]) is not None:
            low, high = (t.to(rows.dtype) for t in pair)
            out = out + F.linear(F.linear(rows, low), high)
        return out if b is None else out + b

    def evaluate(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        up: Sequence[Tensor],
        down: Sequence[Tensor],
        up_bias: Sequence[Tensor] = (),
        down_bias: Sequence[Tensor] = (),
        add: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        **others: Sequence[Tensor],
    ) -> Tensor:
        """x [T, H], ids [T, k], weights [T, k] -> [T, H] in `dtype`; `add` [T, H] is added to the result.

        others: more of `Operands` by name. Scales are as `Stored` says, behind a dim of E (a list: without). Raises TypeError for a name
        that is none of theirs.
        """
        return self.run(x, ids, weights, Operands.named(up=up, down=down, up_bias=up_bias, down_bias=down_bias, **others), add, dtype)

    def resized(self, known: Mapping[int, int]) -> Experts:
        """The same experts with other widths: old -> new."""
        widths = {name: known.get(w, w) for name in ("hidden", "intermediate", "out_features") for w in (getattr(self, name),)}
        return replace(self, **widths, chain=None if self.chain is None else self.chain.resized(known))

    def run(self, x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], add: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As `evaluate`, on the parameters in one bundle."""
        x, weights, ids = x.to(dtype), weights.to(dtype), ids - self.first
        out = x.new_zeros(x.shape[0], self.out_features) if add is None else add.to(dtype).clone()
        for e in range(self.num_experts):
            t, j = torch.where(ids == e)
            if not len(t):
                continue
            w = weights[t, j, None]
            y = self.one(e, x[t] * w, p) if self.weight_on_input else w * self.one(e, x[t], p)
            out = out.index_add(0, t, y)
        if self.num_identity:
            t, j = torch.where((ids >= self.num_experts) & (ids < self.num_experts + self.num_identity))
            out = out.index_add(0, t, x[t] * weights[t, j, None])
        return out


def smooth_of(scales: Sequence[Tensor], e: int) -> Tensor | None:
    """Expert e's smooth scales [in], of [E, in] of all, of a list of E, or of [in] for all; None where there are none."""
    if not scales:
        return None
    t = scales[e] if len(scales) > 1 else scales[0]
    return t[e] if t.ndim == 2 else t


@dataclass(frozen=True)
class SharedExpert:
    """An MLP on the same tokens, added to the routed result: [sigmoid(x·w_gate)] · down act(up x).

    up_stored, down_stored, up_rows, down_rows: as those of `Experts`; None for floats, and for rows that are not rounded.
    """

    intermediate: int
    activation: sp.Expr
    gated: bool = False
    bias: bool = False
    up_stored: Stored | None = None
    down_stored: Stored | None = None
    up_rows: Rows | None = None
    down_rows: Rows | None = None

    @property
    def coded(self) -> bool:
        """Whether weights are codes: the graph goes on computing it then."""
        return self.up_stored is not None or self.down_stored is not None
