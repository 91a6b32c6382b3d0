"""Probes: small inputs of every kind for a region of the shadow, and its run on them in float64.

All floating-point work is lifted to float64. Expert weights are overlapping windows over one small random buffer: E distinct experts,
not E experts' memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
import torch.fx as fx
from torch import Tensor

from ..aten import names
from ..aten.effects import mutated_args
from ..aten.element import fixed_number, shape_of, size_of
from ..aten.names import op_name
from ..recover.region import Block

TOLERANCE = 1e-7


FEW = 7  # probing tokens, a prime that rarely equals another size


@dataclass
class Sizes:
    """Concrete sizes for a probe: values of symbols, and replacements of the integers that follow from the token count."""

    symbols: dict[Any, int]
    literal: dict[int, int]

    def of(self, s: Any) -> Any:
        s = size_of(s)
        if isinstance(s, float):
            return s
        if isinstance(s, sp.Expr):
            return int(s.subs({x: self.symbols.get(x, 3) for x in s.free_symbols}))
        return self.literal.get(s, s)

    def shape(self, n: fx.Node) -> tuple[int, ...]:
        return tuple(self.of(s) for s in shape_of(n))


def size_choices(block: Block) -> list[Sizes]:
    """Few tokens where the graph allows it, else the token count it was traced with."""
    m = block.match
    lead = shape_of(m.tokens)[:-1]
    symbols = sorted({x for s in lead if isinstance(s, sp.Expr) for x in s.free_symbols}, key=str)
    if symbols:
        return [Sizes({x: FEW if i == len(symbols) - 1 else 2 for i, x in enumerate(symbols)}, {})]
    total = 1
    for s in lead:
        total *= s
    traced = Sizes({}, {})
    if total <= 16:
        return [traced]
    literal: dict[int, int] = {}
    big = max(range(len(lead)), key=lambda d: lead[d])
    rest = total // lead[big]
    if rest > 16:
        return [traced]
    for old, new in ((lead[big], FEW), (total, rest * FEW), (total * m.k, rest * FEW * m.k)):
        literal[old] = new
    taken = {s for n in (*block.params(), m.tokens) for s in shape_of(n)[(0 if n is not m.tokens else -1) :]} | {m.k, m.experts.num_experts}
    return [traced] if taken & set(literal) or len(lead) > 1 and rest in literal else [Sizes({}, literal), traced]


def difference(got: Tensor, want: Tensor) -> str | None:
    """None when equal up to rounding in float64."""
    if not want.numel():
        return None
    scale = max(float(want.abs().max()), 1e-30)
    diff = float((got.reshape(want.shape) - want).abs().max())
    return None if diff <= TOLERANCE * scale else f"relative difference {diff / scale:.1e}"


def make_input(block: Block, n: fx.Node, sizes: Sizes, seed: int, gen: torch.Generator) -> Tensor:
    shape = sizes.shape(n)
    m = block.match
    if n is block.ids:
        ids = _probe_ids(shape, m.experts.num_experts, m.experts.num_identity, seed, gen)
        return ids - m.experts.num_experts * torch.randint(0, 2, shape, generator=gen) if block.wraps else ids
    if n is block.weights:
        return torch.rand(shape, generator=gen, dtype=torch.float64) + 0.1
    g = block.gating
    if g is not None and n is g.logits:
        return torch.randn(shape, generator=gen, dtype=torch.float64) * (1, 4, 0.3)[seed % 3]
    if g is not None and n in (g.bias, g.expert_scale):
        b = torch.randn(shape, generator=gen, dtype=torch.float64) * (0.3, 2, 1)[seed % 3]
        return b.abs() + 0.5 if n is g.expert_scale else b
    if n is m.tokens or n is m.base:
        return torch.randn(shape, generator=gen, dtype=torch.float64) * (1, 8, 0.2)[seed % 3]
    if n in block.params() and not n.meta["val"].dtype.is_floating_point:
        return whole_windows(shape, n.meta["val"].dtype, gen)
    if not n.meta["val"].dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=gen).to(n.meta["val"].dtype)
    if any(q.node is n for q in (*m.up_scale, *m.down_scale)):  # so that products of bytes come out of order one
        return torch.randn(shape, generator=gen, dtype=torch.float64) / (32 * m.experts.hidden**0.5)
    return windows(shape, gen)


def _probe_ids(shape: tuple[int, ...], num_experts: int, identity: int, seed: int, gen: torch.Generator) -> Tensor:
    """Distinct ids a token: random; every expert in turn (0 first); the same few for every token."""
    total, k = num_experts + identity, shape[-1]
    n = 1
    for s in shape[:-1]:
        n *= s
    if seed == 0:
        ids = torch.stack([torch.randperm(total, generator=gen)[:k] for _ in range(n)]) if n else torch.zeros(0, k, dtype=torch.long)
    elif seed == 1:
        ids = (torch.arange(n)[:, None] * k + torch.arange(k)) % total
    else:
        ids = torch.arange(k).flip(0).expand(n, k).clone()
    return ids.reshape(shape)


def windows(shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    """A random parameter of any size in little memory: rows and experts start a few elements apart in one buffer."""
    scale = (shape[-1] if shape else 1) ** -0.5 * 2
    return _windows(shape, gen, lambda t: t * scale)


def whole_windows(shape: tuple[int, ...], dtype: torch.dtype, gen: torch.Generator) -> Tensor:
    """As `windows`, for weights stored as integers: of all values that a byte can have, and beyond where the type is wider."""
    least, most = max(torch.iinfo(dtype).min, -4096), min(torch.iinfo(dtype).max, 4096)
    return _windows(shape, gen, lambda t: (t * (most / 2)).round().clamp(least, most).to(dtype))


def _windows(shape: tuple[int, ...], gen: torch.Generator, made: Callable[[Tensor], Tensor]) -> Tensor:
    numel = 1
    for s in shape:
        numel *= s
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


TROUBLE = (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError, AssertionError)  # what running a region may raise


@contextmanager
def one_thread() -> Iterator[None]:
    """Probes are tiny: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def probe_values(block: Block, boundary: list[fx.Node], sizes: Sizes, seed: int) -> dict[fx.Node, Any]:
    """A value for each node of a boundary; nodes that hold the same get the same."""
    gen = torch.Generator().manual_seed(seed)
    env: dict[fx.Node, Any] = {n: make_input(block, n, sizes, seed, gen) for n in boundary if n not in block.twins}
    env.update({n: env[o].reshape(sizes.shape(n)) for n, o in block.twins.items() if n in boundary})
    return env


def evaluate(block: Block, nodes: list[fx.Node], env: dict[fx.Node, Any], sizes: Sizes, outs: list[fx.Node]) -> dict[fx.Node, Any]:
    """All values of a region on a probe; what the region writes in place does not change the probe's own."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        computed = dict(env)
        if any(mutated_args(n) for n in nodes):
            heavy = set(block.params())
            computed.update({n: v.clone() for n, v in env.items() if n not in heavy})
        run(nodes, computed, sizes)
        computed.update({n: v for n, v in env.items() if n not in outs})
    return computed


def run(nodes: list[fx.Node], env: dict[fx.Node, Any], sizes: Sizes) -> None:
    """Interpret shadow nodes; results go into `env`."""

    def load(a: Any) -> Any:
        if isinstance(a, fx.Node):
            return env[a]
        if isinstance(a, (list, tuple)):
            return type(a)(load(x) for x in a)
        if isinstance(a, torch.dtype):
            return torch.float64 if a.is_floating_point else a
        if isinstance(a, bool):
            return a
        if isinstance(a, int):
            return sizes.literal.get(a, a)
        return a

    for n in nodes:
        if n.op == "placeholder" or op_name(n) in names.SIZE or fixed_number(n):
            env[n] = sizes.of(n.meta["val"])
        elif n.op == "get_attr":
            v = constant(n)
            env[n] = v.to(torch.float64) if isinstance(v, Tensor) and v.is_floating_point() else v
        elif op_name(n) in names.LIKE and n.args[0] not in env:
            env[n] = _filled(n, sizes)
        elif op_name(n) == "type_as":
            env[n] = _cast(n, load(n.args[0]))
        else:
            env[n] = _call(n, load(n.args), {k: load(v) for k, v in n.kwargs.items()})


def _filled(n: fx.Node, sizes: Sizes) -> Tensor:
    """zeros_like and its kin where only the shape is known."""
    value = {"zeros_like": 0, "ones_like": 1, "empty_like": 7, "full_like": n.args[1] if len(n.args) > 1 else n.kwargs.get("fill_value")}
    dtype = n.meta["val"].dtype
    return torch.full(sizes.shape(n), value[op_name(n)], dtype=torch.float64 if dtype.is_floating_point else dtype)


def constant(n: fx.Node) -> Any:
    value: Any = n.graph.owning_module
    for part in str(n.target).split("."):
        value = getattr(value, part)
    return value


def _call(n: fx.Node, args: Any, kwargs: Any) -> Any:
    name = op_name(n)
    kwargs = {k: (torch.device("cpu") if k == "device" else v) for k, v in kwargs.items()}
    args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
    if name in names.GROUPED:
        return _grouped_mm(*args, **kwargs)
    if name == "histc" and not args[0].is_floating_point():  # counts of integers: accelerators only
        return n.target(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)  # type: ignore[operator]
    if name in names.EMPTY:
        out = n.target(*args, **kwargs)  # type: ignore[operator]
        return out.fill_(7) if isinstance(out, Tensor) else out
    if name in names.CAST and isinstance(args[0], Tensor):
        return _cast(n, args[0])
    out = n.target(*args, **kwargs)  # type: ignore[operator]
    if isinstance(out, Tensor) and out.is_floating_point() and out.dtype != torch.float64:
        out = out.to(torch.float64)
    return out


def _cast(n: fx.Node, x: Tensor) -> Tensor:
    dtype = n.meta["val"].dtype
    return x.to(torch.float64 if dtype.is_floating_point else dtype)


def _grouped_mm(x: Tensor, w: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    assert offs is not None and bias is None
    out = x.new_zeros(x.shape[0], w.shape[-1])
    start = 0
    for e, end in enumerate(offs.tolist()):
        out[start:end] = x[start:end] @ w[e]
        start = end
    return out
