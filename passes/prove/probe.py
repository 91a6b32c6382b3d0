"""Probes: values for the tensors at a region's edge, of every kind that has ever told two functions apart.

Expert weights are overlapping windows over one small random buffer where they are large: E distinct experts, not E experts' memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ...ir import Gating
from .edge import ENDS, Edge, Small

_TRIES = 8  # draws of a row of logits until no two candidates tie
_LARGE = 1 << 22  # elements of a window that is left as it is
_DRAWN = 10  # multiplications in the time of one random number
_GAP = 1e-6  # relative to the largest score: far above rounding in float64


@dataclass(frozen=True)
class Kind:
    """What a probe is for. `scale`: of tokens, `peaks`: of logits. `may_fail`: the graph's own code may refuse such values."""

    name: str
    scale: float = 1.0
    peaks: float = 1.0
    zeros: bool = False  # rows of zeros, biases of zero: the kinks of relu and its kin
    ids: str = "in turn"
    may_fail: bool = False


USUAL = (
    Kind("usual"),
    Kind("rows of zeros", 8.0, 4.0, zeros=True),
    Kind("the same experts for every token", 0.2, 0.3, ids="alike"),
)
MAPPED = (  # ids that are no selection's own
    Kind("an expert twice", ids="twice"),
    Kind("ids below zero", ids="below", may_fail=True),
    Kind("ids beyond the last expert", ids="beyond", may_fail=True),
)


def kinds(edge: Edge) -> tuple[Kind, ...]:
    least, largest = edge.within
    first = edge.experts.first
    below, beyond = least is None or least < first, largest is None or largest >= first + edge.total
    never = {"" if below else "below", "" if beyond else "beyond"}
    return (*USUAL, *(k for k in (MAPPED if edge.mapped or first else ()) if k.ids not in never))


def values(edge: Edge, small: Small, wanted: Sequence[fx.Node], kind: Kind, turn: int) -> dict[fx.Node, Any]:
    """A value for each of the nodes; nodes that hold the same get the same. `turn`: the number of the probe."""
    draw = _Draw(edge, small, kind, turn)
    env: dict[fx.Node, Any] = {n: draw.value(n) for n in wanted if n not in edge.twins}
    env.update({n: env[o].reshape(small.shapes[n]) for n, o in edge.twins.items() if n in wanted})
    return env


def effort(small: Small, wanted: Sequence[fx.Node]) -> int:
    """About what it takes to draw the values, in multiplications (see `region.effort`): of a large parameter one window is drawn."""
    return _DRAWN * sum(_room(small.shapes[n]) for n in wanted)


def _room(shape: tuple[int, ...]) -> int:
    return math.prod(shape[-2:]) + 8 * shape[0] if len(shape) > 2 else math.prod(shape)


class _Draw:
    def __init__(self, edge: Edge, small: Small, kind: Kind, turn: int) -> None:
        self.edge, self.small, self.kind, self.turn = edge, small, kind, turn
        self.generator = torch.Generator().manual_seed(turn)
        self.drawn: dict[fx.Node, Tensor] = {}
        self.biases = 0

    def value(self, n: fx.Node) -> Tensor:
        if n not in self.drawn:
            self.drawn[n] = laid_out(self._value(n, self.small.shapes[n]), n, self.small)
        return self.drawn[n]

    def _value(self, n: fx.Node, shape: tuple[int, ...]) -> Tensor:
        role, dtype = self.edge.roles.get(n, "other"), n.meta["val"].dtype
        if role == "ids":
            ids = self.ids(math.prod(shape) // self.edge.k)
            if self.edge.wraps:
                ids = ids.remainder(self.edge.total) - self.edge.total * self._integers(tuple(ids.shape))
            return ids.reshape(shape).to(dtype)
        if role == ENDS:
            return self._ends(shape[0]).to(dtype)
        if role == "weights":
            return torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.1
        if role in ("tokens", "base"):
            return self._rows(shape, self.kind.scale, role == "tokens")
        if role == "logits":
            return self._logits(shape)
        if role in ("selection bias", "expert scale"):
            return self._table(shape, role)
        if role == "scale" and dtype is torch.uint8:  # exponents: numbers about 2^-7
            return torch.randint(118, 123, shape, generator=self.generator).to(dtype)
        if role in ("weight", "zero") and dtype in (torch.uint8, torch.int32):
            return word_windows(shape, dtype, self.generator)
        if role == "table" and not dtype.is_floating_point:  # by how much codes are shifted
            return torch.randint(0, 25, shape, generator=self.generator).to(dtype)
        if role == "group":
            return torch.randint(0, self.edge.counts[n], shape, generator=self.generator).to(dtype)
        if not dtype.is_floating_point:
            return whole_windows(shape, dtype, self.generator) if role == "weight" else self._integers(shape).to(dtype)
        if role == "scale":  # so that products of bytes come out of order one
            return self._normal(shape) / (32 * self.small.experts.hidden**0.5)
        return self._bias(windows(shape, self.generator)) if role == "bias" else windows(shape, self.generator)

    def _ends(self, experts: int) -> Tensor:
        """Group ends [E] of the rows of tokens, some groups empty; where zeros are wanted, rows stay behind the last one."""
        rows = math.prod(self.small.shapes[self.edge.tokens][:-1])
        ids = self._ids(rows - 2 if self.kind.zeros and rows > 2 else rows).reshape(-1) % experts
        return torch.bincount(ids, minlength=experts).cumsum(0)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _integers(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(0, 2, shape, generator=self.generator)

    def _rows(self, shape: tuple[int, ...], scale: float, tokens: bool) -> Tensor:
        x = self._normal(shape) * scale
        if self.kind.zeros and tokens:
            x.view(-1, shape[-1])[1::3] = 0
        return x

    def _bias(self, b: Tensor) -> Tensor:
        """Every second expert's is zero where zeros are wanted."""
        self.biases += 1
        if not self.kind.zeros or b.ndim == 1 and self.biases % 2:
            return b
        out = b.clone()
        out[::2] = 0
        return torch.zeros_like(b) if b.ndim == 1 else out

    def ids(self, tokens: int) -> Tensor:
        """ids [tokens, k]: distinct in a row, each expert in its turn over all probes; the same few; some twice; some of no expert."""
        return self._ids(tokens) + self.edge.experts.first

    def _ids(self, tokens: int) -> Tensor:
        total, k = self.edge.total, self.edge.k
        if self.kind.ids == "alike":
            return torch.arange(k).flip(0).expand(tokens, k).clone() % total
        order = torch.randperm(total, generator=torch.Generator().manual_seed(5))
        ids = order[(torch.arange(tokens * k) + self.turn * tokens * k) % total].reshape(tokens, k)
        if self.kind.ids == "twice" and k > 1:
            ids[::2, -1] = ids[::2, 0]
        if self.kind.ids in ("below", "beyond"):
            ids[::2, 0] = -1 if self.kind.ids == "below" else total
        return ids

    def _logits(self, shape: tuple[int, ...]) -> Tensor:
        """Scores by which each expert is chosen in its turn, and no two candidates tie."""
        g, experts = self.edge.gating, shape[-1]
        assert g is not None
        x = (self._normal(shape) * self.kind.peaks).reshape(-1, experts)
        if self.kind.ids == "in turn":
            x = x.scatter_add(-1, self.ids(x.shape[0]) % experts, self._normal((x.shape[0], self.edge.k)).abs() + 1)
        bias = next((self.value(n) for n, role in self.edge.roles.items() if role == "selection bias"), None)
        for _ in range(_TRIES):
            close = ties(g, x, bias)
            if not bool(close.any()):
                break
            x = torch.where(close[:, None], self._normal((x.shape[0], experts)) * self.kind.peaks, x)
        return x.reshape(shape)

    def _table(self, shape: tuple[int, ...], role: str) -> Tensor:
        b = self._normal(shape) * (0.3, 1.0, 0.5)[self.turn % 3]
        grouped = self.edge.gating is not None and self.edge.gating.groups is not None
        if role == "expert scale":
            return b.abs() + 0.5
        return b.abs() if grouped else b  # or the experts of losing groups may tie: any choice is right then


def ties(g: Gating, logits: Tensor, bias: Tensor | None) -> Tensor:
    """[T]: whether the last that is chosen and the first that is not are as good as equal, experts or groups of them."""
    bias = None if bias is None else bias.reshape(-1)
    close = _narrow(g.selection(logits, bias, torch.float64)[0], g.k)
    if g.groups is not None:
        free, _ = replace(g, groups=None).selection(logits, bias, torch.float64)
        best = free.unflatten(-1, (g.groups.count, -1)).topk(g.groups.top, dim=-1).values.sum(-1)
        close = close | _narrow(best, g.groups.kept)
    return close


def _narrow(scores: Tensor, k: int) -> Tensor:
    if scores.shape[-1] <= k:
        return torch.zeros(scores.shape[0], dtype=torch.bool)
    best = scores.topk(k + 1, dim=-1).values
    size = scores.abs().nan_to_num(posinf=0.0, neginf=0.0).amax(-1).clamp(min=1e-30)
    return (best[:, k - 1] - best[:, k]).nan_to_num(nan=0.0) <= _GAP * size


# ---- memory -------------------------------------------------------------------------------------------------------------


def laid_out(x: Tensor, n: fx.Node, small: Small) -> Tensor:
    """The same values with the dims in memory in the order that the graph's own tensor has them, broadcast where it is."""
    v = n.meta["val"]
    if v.layout is not torch.strided or x.ndim != v.ndim or x.ndim < 2 or x.numel() > _LARGE:
        return x
    strides = [small.sizes.of(s) for s in v.stride()]
    if all(isinstance(s, int) for s in (*v.shape, *v.stride())) and 0 not in v.stride():
        if 1 + sum((n - 1) * s for n, s in zip(v.shape, v.stride(), strict=True)) < v.numel():  # a window of a probe that lies over itself
            return x
    order = sorted(range(x.ndim), key=lambda d: -strides[d])
    large = [d for d in order if x.shape[d] > 1]
    if large != sorted(large):
        x = x.permute(order).contiguous().permute([order.index(d) for d in range(x.ndim)])
    return x


def windows(shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    """A random parameter of any size in little memory: rows and experts start a few elements apart in one buffer."""
    scale = (shape[-1] if shape else 1) ** -0.5 * 2
    return _windows(shape, gen, lambda t: t * scale)


def whole_windows(shape: tuple[int, ...], dtype: torch.dtype, gen: torch.Generator) -> Tensor:
    """As `windows`, for weights stored as integers: of all values that a byte can have, and beyond where the type is wider."""
    least, most = max(torch.iinfo(dtype).min, -4096), min(torch.iinfo(dtype).max, 4096)
    return _windows(shape, gen, lambda t: (t * (most / 2)).round().clamp(least, most).to(dtype))


def word_windows(shape: tuple[int, ...], dtype: torch.dtype, gen: torch.Generator) -> Tensor:
    """As `windows`, for words that codes are packed in: all their bits are in use."""
    info = torch.iinfo(dtype)
    lead, rest = (shape[0], shape[1:]) if len(shape) > 2 else (0, shape)
    flat = torch.randint(info.min, info.max + 1, (math.prod(rest) + 8 * lead,), generator=gen).to(dtype)
    strides = torch.empty(rest, device="meta").stride()
    return flat.as_strided(shape, (8, *strides)) if lead else flat.reshape(shape)


def _windows(shape: tuple[int, ...], gen: torch.Generator, made: Callable[[Tensor], Tensor]) -> Tensor:
    numel = math.prod(shape)
    if numel < 2**16 or len(shape) < 2:
        return made(torch.randn(shape, generator=gen, dtype=torch.float64))
    last = shape[-1]
    if len(shape) == 2:
        return made(_noise(last + 3 * shape[0], gen)).as_strided(shape, (3, 1))
    return made(_noise(shape[-2] * last + 8 * shape[0], gen)).as_strided(shape, (8, last, 1))


_SPARE = 1 << 14
_kept: list[Tensor] = []


def _noise(size: int, gen: torch.Generator) -> Tensor:
    """So many random numbers: a piece, from a random place on, of one buffer that is kept."""
    start = int(torch.randint(0, _SPARE, (), generator=gen))
    if not _kept or _kept[0].numel() < size + _SPARE:
        _kept[:] = [torch.randn(size + _SPARE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)]
    return _kept[0][start : start + size]
