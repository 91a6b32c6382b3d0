"""Validate: run the recovered meaning against the very subgraph it describes, in float64, on a few probing tokens.

All floating-point work of the subgraph is lifted to float64, so that agreement to 1e-7 means the same function and not a
tolerance. Expert weights are overlapping windows over one small random buffer: E distinct experts, not E experts' memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
import torch.fx as fx
from torch import Tensor

from ..ir import Rejection
from .fused import is_fused
from .pull import fixed_number, op_name, shape_of, size_of
from .region import SHAPE_ONLY, SIZES, Block, inside
from .shadow import mutated_args

TOLERANCE = 1e-7
FEW = 7  # probing tokens, a prime that rarely equals another size
_proved: dict[Any, str | None] = {}


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


def validate(block: Block) -> Rejection | None:
    """None when the block's IR and its subgraph agree on every probe; else which part does not, and by how much."""
    parts: list[Any] = []
    routing = [n for n in (block.raw_ids, block.weights, block.ids if block.masked else None) if n is not None]
    if is_fused(block.match.out):  # its experts were compared with the original function when it was captured
        if block.gating is not None and block.raw_ids is not None and block.weights is not None:
            parts.append((_routing_probe, routing, block.routing_inputs(), "the routing"))
    elif block.ids is not None and block.weights is not None:
        parts.append((_experts_probe, [block.match.out], block.expert_inputs(), "the experts"))
        if block.gating is not None and block.raw_ids is not None:
            parts.append((_routing_probe, routing, block.routing_inputs(), "the routing"))
    else:
        tokens_and_rest = [
            n for n in dict.fromkeys([block.match.tokens, block.match.base, *block.params(), *block.routing_inputs()]) if n is not None
        ]
        parts.append((_joint_probe, [block.match.out], tokens_and_rest, "the block"))
    for probe, outs, boundary, what in parts:
        nodes = inside(outs, boundary)
        if isinstance(nodes, Rejection):
            return nodes
        key = (probe.__name__, block.ir, block.fold.factor, signature(nodes, boundary, outs))
        if key not in _proved:
            if len(_proved) > 4096:
                _proved.clear()
            _proved[key] = _check(block, probe, nodes, outs, boundary)
        if _proved[key] is not None:
            return Rejection(f"{what} and the recovered formula disagree: {_proved[key]}", block.match.out, "validate")
    return None


def signature(nodes: list[fx.Node], boundary: list[fx.Node], outs: list[fx.Node]) -> Any:
    """Equal for regions that compute the same thing from inputs of the same shapes (as equal layers do)."""
    number = {n: i for i, n in enumerate([*boundary, *nodes])}

    def arg(a: Any) -> Any:
        if isinstance(a, fx.Node):
            return ("n", number.get(a, str(a)))
        if isinstance(a, (list, tuple)):
            return tuple(arg(x) for x in a)
        return (type(a).__name__, str(a))

    head = tuple((str(shape_of(n)), str(n.meta["val"].dtype)) for n in boundary)
    body = tuple(
        (str(n.target), arg(n.args), arg(tuple(sorted(n.kwargs.items())))) if n.op != "get_attr" else _constant_key(n) for n in nodes
    )
    return hash((head, body, tuple(number.get(o, -1) for o in outs)))


def _constant_key(n: fx.Node) -> Any:
    v = _constant(n)
    return ("const", tuple(v.shape), tuple(v.flatten().tolist())) if isinstance(v, Tensor) and v.numel() < 4096 else ("const", id(v))


def _check(block: Block, probe: Any, nodes: list[fx.Node], outs: list[fx.Node], boundary: list[fx.Node]) -> str | None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # probes are tiny: threads only wait for each other
    try:
        return _try_sizes(block, probe, nodes, outs, boundary)
    finally:
        torch.set_num_threads(threads)


def _try_sizes(block: Block, probe: Any, nodes: list[fx.Node], outs: list[fx.Node], boundary: list[fx.Node]) -> str | None:
    errors = None
    for sizes in size_choices(block):
        try:
            for seed in range(3):
                bad = _compare(block, probe, nodes, outs, boundary, sizes, seed)
                if bad is not None:
                    return bad
            return None
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError, AssertionError) as e:
            errors = f"the subgraph could not be run on probing inputs ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})"
    return errors


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


def _compare(
    block: Block, probe: Any, nodes: list[fx.Node], outs: list[fx.Node], boundary: list[fx.Node], sizes: Sizes, seed: int
) -> str | None:
    gen = torch.Generator().manual_seed(seed)
    env = {n: make_input(block, n, sizes, seed, gen) for n in boundary if n not in block.twins}
    env.update({n: env[o].reshape(sizes.shape(n)) for n, o in block.twins.items() if n in boundary})
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        computed = dict(env)
        if any(mutated_args(n) for n in nodes):  # in-place ops of the region must not change the probe's own inputs
            heavy = set(block.params())
            computed.update({n: v.clone() for n, v in env.items() if n not in heavy})
        run(nodes, computed, sizes)
        computed.update({n: v for n, v in env.items() if n not in outs})
        bad: str | None = probe(block, computed, outs)
    return None if bad is None else f"{bad} on probe {seed}"


def _difference(got: Tensor, want: Tensor) -> str | None:
    """None when equal up to rounding in float64."""
    if not want.numel():
        return None
    scale = max(float(want.abs().max()), 1e-30)
    diff = float((got.reshape(want.shape) - want).abs().max())
    return None if diff <= TOLERANCE * scale else f"relative difference {diff / scale:.1e}"


# ---- what is compared --------------------------------------------------------------------------------------------------


def _experts_probe(block: Block, env: dict[fx.Node, Tensor], outs: list[fx.Node]) -> str | None:
    assert block.ids is not None and block.weights is not None
    k = block.match.k
    return _difference(env[outs[0]], _experts_value(block, env, env[block.ids].reshape(-1, k), env[block.weights].reshape(-1, k)))


def _routing_probe(block: Block, env: dict[fx.Node, Tensor], outs: list[fx.Node]) -> str | None:
    """The graph's choice must be a top-k of the recovered criterion (any one at ties), its weights the recovered ones of that choice."""
    g = block.gating
    assert g is not None
    gating = g.gating
    ids, weights, *mapped = (env[o].reshape(-1, gating.k) for o in outs)
    choice, raw = gating.selection(*_routing_values(block, env)[:2], torch.float64)
    best = choice.topk(gating.k, dim=-1).values
    chosen = choice.gather(-1, ids).sort(-1, descending=True).values
    if bool((ids.sort(-1).values.diff(dim=-1) == 0).any()) or not torch.allclose(chosen, best, rtol=1e-9, atol=1e-12):
        return "other experts are selected"
    _, bias, table = _routing_values(block, env)
    wanted = gating.weights_of(raw, ids, bias, table)
    if mapped:
        e = block.match.experts
        valid = (mapped[0] >= 0) & (mapped[0] < e.num_experts + e.num_identity)
        weights, wanted = weights * valid, wanted * valid
    return _difference(weights * block.fold.factor, wanted)


def _joint_probe(block: Block, env: dict[fx.Node, Tensor], outs: list[fx.Node]) -> str | None:
    g = block.gating
    assert g is not None
    w, ids = g.gating.evaluate(*_routing_values(block, env))
    return _difference(env[outs[0]] * block.fold.factor, _experts_value(block, env, ids, w))


def _routing_values(block: Block, env: dict[fx.Node, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    g = block.gating
    assert g is not None
    logits = env[g.logits].reshape(-1, g.gating.num_experts)
    return logits, *(None if n is None else env[n].reshape(-1) for n in (g.bias, g.expert_scale))  # type: ignore[return-value]


def _experts_value(block: Block, env: dict[fx.Node, Tensor], ids: Tensor, w: Tensor) -> Tensor:
    m = block.match
    x = env[m.tokens].reshape(-1, m.experts.hidden)

    def get(params: list[Any]) -> list[Tensor]:
        return [env[q.node] if q.view is None else env[q.node].reshape(q.view) for q in params]

    add = None if m.base is None else env[m.base].reshape(-1, m.experts.out_features)
    return m.experts.evaluate(x, ids, w, get(m.up), get(m.down), get(m.up_bias), get(m.down_bias), add)


# ---- probing inputs ----------------------------------------------------------------------------------------------------


def make_input(block: Block, n: fx.Node, sizes: Sizes, seed: int, gen: torch.Generator) -> Tensor:
    shape = sizes.shape(n)
    m = block.match
    if n is block.ids:
        return _probe_ids(shape, m.experts.num_experts, m.experts.num_identity, seed, gen)
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
    if not n.meta["val"].dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=gen).to(n.meta["val"].dtype)
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
    numel = 1
    for s in shape:
        numel *= s
    if numel < 2**16 or len(shape) < 2:
        return torch.randn(shape, generator=gen, dtype=torch.float64) * scale
    last = shape[-1]
    if len(shape) == 2:
        return (torch.randn(last + 3 * shape[0], generator=gen, dtype=torch.float64) * scale).as_strided(shape, (3, 1))
    base = torch.randn(shape[-2] * last + 8 * shape[0], generator=gen, dtype=torch.float64) * scale
    return base.as_strided(shape, (8, last, 1))


# ---- the subgraph, lifted to float64 -----------------------------------------------------------------------------------


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
        if n.op == "placeholder" or op_name(n) in SIZES or fixed_number(n):
            env[n] = sizes.of(n.meta["val"])
        elif n.op == "get_attr":
            v = _constant(n)
            env[n] = v.to(torch.float64) if isinstance(v, Tensor) and v.is_floating_point() else v
        elif op_name(n) in SHAPE_ONLY and n.args[0] not in env:
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


def _constant(n: fx.Node) -> Any:
    value: Any = n.graph.owning_module
    for part in str(n.target).split("."):
        value = getattr(value, part)
    return value


def _call(n: fx.Node, args: Any, kwargs: Any) -> Any:
    name = op_name(n)
    kwargs = {k: (torch.device("cpu") if k == "device" else v) for k, v in kwargs.items()}
    args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
    if name in ("_grouped_mm", "grouped_mm"):
        return _grouped_mm(*args, **kwargs)
    if name.startswith(("empty", "new_empty")):
        out = n.target(*args, **kwargs)  # type: ignore[operator]
        return out.fill_(7) if isinstance(out, Tensor) else out
    if name in ("to", "_to_copy", "float", "double", "half") and isinstance(args[0], Tensor):
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
