"""The inside of one expert: down act(up x), parsed into projections and an activation expression."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy as sp

from .. import terms as T
from ..aten import names
from ..aten.names import op_name, through
from ..terms import Term
from . import adapters, grids, shifts
from . import scales as channels
from .bridge import Bridge
from .linear import Linear, affine, linear_of
from .packed import is_packed
from .rounding import ROUNDED
from .rows import NO_CHAIN, No, factors, nodes_of, outer_atoms, reads

_CLOSE = names.CAST | names.RESHAPE | names.CLAMP  # what may stand behind a rounding
_SAID = {"max": "a maximum over features", "prod": "a product over features", "topk": "a selection", "ite": "a condition"}


@dataclass
class Core:
    """One expert's function, parsed."""

    down: Linear
    linears: dict[sp.Symbol, Linear]
    expr: sp.Expr
    inner: Any
    on_input: Term | None = None
    tokens: list[Term] = field(default_factory=list)
    table: Term | None = None


def parse_core(core: Term, t: Term, h: Term, expert: Term, outside: Term | None = None, tables: Term | None = None) -> Core:
    """c · Σ_i down[e, h, i] · act(...), plus a bias [e, h].

    `outside`: what multiplies it. It and c belong to the activation when the routing weight scales the expert's input.
    `tables`: numbers of the experts that multiply it, scales of its projections among them; what is left of them is `Core.table`.
    """
    scale, total, bias, channel, pairs = _output(core, h, expert)
    i, inner = total.args
    downs = [f for f in factors(inner) if grids.belongs(f, expert) and T.uses(f, h)]
    parts = grids.split(downs)
    if parts is None:
        raise No(_why_no_matrix(factors(inner), h, i, expert) or _why_not_own(factors(inner), h, i, len(downs)))
    rest = T.mul(*(f for f in factors(inner) if f not in parts.factors))
    down = linear_of(parts, h, i, expert, factors(inner))
    if down.stride != 1 or down.offset != 0:
        raise No("the down projection reads a part of its weight")
    if bias is not None:
        down.bias = bias.args[0]
    if pairs and channel is None and channels.coded_weights(core, expert):  # a matrix's own scale is not the pair's
        own = [f for f in factors(scale) if channels.for_expert(channels.bare(f), expert)]
        scale, channel = T.mul(*(f for f in factors(scale) if f not in own)), T.mul(*own) if own else None
    down.pair = adapters.beside(pairs, down, scale, rest, i)
    if channel is not None:
        down.channel = channels.channel(channel, h, expert, 1, 0)
    reader = Reader(t, i, expert, channels.coded_weights(core, expert))
    expr = reader.read(rest) * reader.read(scale) * (sp.S.One if tables is None else reader.read(tables))
    if reader.routed() and outside is not None:
        if bias is not None and outside.op != "c":
            raise No("a routing weight on the input of experts whose output has a bias, and another one on their output")
        expr = expr * reader.read(outside)
    expr, scaled, table = channels.put_in(expr, reader.channels, reader.linears, expert)
    for name, s in scaled.items():
        lin = reader.linears[name]
        lin.channel = channels.channel(reader.channels[s], i, expert, lin.stride, lin.offset)
    expr, on_input = _input_weight(expr, reader)
    return Core(down, reader.linears, expr, i.args[1], on_input, reader.tokens, None if table is None else reader.channels[table])


def _output(core: Term, h: Term, expert: Term) -> tuple[Term, Term, Term | None, Term | None, dict[Term, adapters.Pair]]:
    """core = scale · s[e, h] · (Σ_i ...) + bias + pairs, the scale free of features: scale, sum, bias, s, low-rank pairs."""
    sums: list[tuple[Term, Term, Term | None]] = []
    bias, pairs = None, adapters.beside_others(core, h, expert)
    for part in core.args if core.op == "add" else (core,):
        if part in pairs:
            continue
        found = [f for f in factors(part) if f.op == "sum" and T.uses(f, h)]
        own = [f for f in factors(part) if channels.bare(f).op == "a" and T.uses(f, expert) and T.uses(f, h)]
        others = [f for f in factors(part) if f not in found and f not in own]
        if len(found) == 1 and len(own) < 2 and not any(T.uses(f, h) for f in others):
            sums.append((T.mul(*others), found[0], own[0] if own else None))
        elif part.op == "a" and T.uses(part, expert) and T.uses(part, h) and bias is None:
            bias = part
        else:
            raise adapters.why_no_pair(part, h, expert) or _why_no_output(part, h)
    if len(sums) != 1:
        raise adapters.NoPair(adapters.APART) if pairs else No("an expert's output is not one down projection")
    scale, total, channel = sums[0]
    return scale, total, bias, channel, pairs


def _why_no_output(part: Term, h: Term) -> No:
    if any(x.op == "ite" and T.uses(x.args[0], h) for x in T.walk(part)):
        return No("an expert's output is replaced where a condition on it holds (y[y > 1] = 1, where): clamp, relu and the like are read")
    return No(f"an expert adds to its output what is no projection of its own{reads(part)}")


def _why_not_own(fs: tuple[Term, ...], out: Term, inp: Term, own: int) -> str:
    """What the last product of an expert reads where that is not one weight of its own."""
    same = [f for f in fs if f.op == "a" and T.uses(f, out) and T.uses(f, inp)]
    if own == 0 and same:
        return f"all experts have one and the same down projection{reads(same[0])}: a weight must be each expert's own"
    return f"an expert's last product does not read one weight of its own{reads(T.mul(*same))}"


def _why_no_matrix(fs: tuple[Term, ...], out: Term, inp: Term, expert: Term) -> str | None:
    """What else than one weight a product holds: scales that do not come out of its sum, or a zero point."""
    if (why := shifts.shifted(fs, expert)) is not None:
        return why
    if _scaled_by_codes(fs, expert):
        return (
            "the scales of a weight are codes with scales of their own (double quantisation): make floats of the scales once, when loading"
        )
    if any(f.op == "add" and any(channels.is_integer(x) for x in T.walk(f) if x.op == "a" and T.uses(x, expert)) for f in fs):
        return "an integer weight has a zero point"
    if any(f.op == "add" and any(is_packed(x) for x in outer_atoms(f)) for f in fs):
        return "a zero point of packed codes is neither taken off them, (q - zero) * scale, nor added behind their scale, q * scale + zero"
    read = [f for f in fs if f.op == "a" and T.uses(f, expert) and T.uses(f, inp)]
    if len(read) < 2 or not any(channels.is_coded(f) for f in read):
        return None
    own = all(T.uses(f, out) for f in read)
    return "a weight has more than one scale along its inputs" if own else "a scale is over an input channel"


def _scaled_by_codes(fs: tuple[Term, ...], expert: Term) -> bool:
    """codes · (codes' · floats [+ floats]): what multiplies a weight's codes is made of codes and floats."""
    alone = [f for f in fs if f.op == "a" and T.uses(f, expert) and channels.is_coded(f)]
    sums = [f for f in fs if f.op == "add" and any(x.op == "a" and T.uses(x, expert) and channels.is_coded(x) for x in T.walk(f))]
    floats = [f for f in fs if f.op == "a" and T.uses(f, expert) and f not in alone]
    return len(alone) == 1 and len(sums) == 1 or len(alone) == 2 and len(floats) == 1


def _input_weight(expr: sp.Expr, reader: Reader) -> tuple[sp.Expr, Term | None]:
    """act(w·a, w·b) with one routing weight w: the weight multiplies the expert's input."""
    if not reader.routed():
        return expr.subs({s: sp.sympify(x.args[0]) for s, x in reader.scalars.items()}), None
    scalars = set(reader.scalars)
    biased = {s for s, lin in reader.linears.items() if lin.bias is not None}
    for weight in _input_weights(expr, reader):
        if any(reader.linears[s].scale != weight for s in biased):
            continue
        fresh = {s: sp.Symbol(f"in_{s.name}", real=True) for s in reader.linears}
        out = expr.subs({s: f if s in biased else f / weight for s, f in fresh.items()}, simultaneous=True)
        out = sp.powsimp(sp.expand_power_base(out)) if scalars & out.free_symbols else out
        if not scalars & out.free_symbols:
            powers = weight.as_powers_dict()
            term = T.mul(*(T.power(reader.scalars[s], int(e) if e.is_Integer else float(e)) for s, e in powers.items() if s in scalars))
            return out.subs({f: s for s, f in fresh.items()}, simultaneous=True), term
    if any(op_name(through(n, _CLOSE)) == "round" for x in reader.tokens for n in nodes_of(x)):
        raise No(ROUNDED)
    raise No("a routing value enters an expert's activation")


def _input_weights(expr: sp.Expr, reader: Reader) -> list[sp.Expr]:
    """Candidates for the routing weight: what multiplies a projection that has a bias, or one inside the activation."""
    scalars, linears = set(reader.scalars), set(reader.linears)
    out: dict[sp.Expr, None] = {lin.scale: None for lin in reader.linears.values() if lin.scale != 1}
    for place in (*expr.atoms(sp.Mul), expr):
        found = [s for s in linears if s in place.free_symbols]
        if len(found) == 1 and place.is_Mul:
            ratio = sp.cancel(place / found[0])
            weight = sp.Mul(*(b**e for b, e in ratio.as_powers_dict().items() if b in scalars))
            if weight != 1 and not linears & ratio.free_symbols:
                out[weight] = None
    return list(out)


def _symbol_of(x: Term, known: dict[sp.Symbol, Term], prefix: str, **assumptions: bool) -> sp.Symbol:
    """The symbol that stands for a term, a new one where there is none yet."""
    for symbol, term in known.items():
        if term is x:
            return symbol
    symbol = sp.Symbol(f"{prefix}{len(known)}", **assumptions)
    known[symbol] = x
    return symbol


class Reader(Bridge):
    """Turns the inside of one expert, a term in i, into an activation expression over its up projections."""

    def __init__(self, t: Term, i: Term, expert: Term, integers: bool = False) -> None:
        self.t, self.i, self.expert, self.integers = t, i, expert, integers
        self.linears: dict[sp.Symbol, Linear] = {}
        self.by_key: dict[Any, sp.Symbol] = {}
        self.tokens: list[Term] = []
        self.scalars: dict[sp.Symbol, Term] = {}
        self.channels: dict[sp.Symbol, Term] = {}  # scales of output channels
        self.memo: dict[Term, sp.Expr] = {}

    def read(self, x: Term) -> sp.Expr:
        out = self.memo.get(x)
        if out is None:
            out = self.memo[x] = self._read(x)
        return out

    def _read(self, x: Term) -> sp.Expr:
        if x.op != "c" and not T.uses(x, self.i):
            return self.scalar(x)
        if (inverse := self._inverse(x)) is not None:
            return inverse
        return self.add(x) if x.op == "add" else self.arithmetic(x, self.read)

    def number(self, v: Any) -> sp.Expr:
        return sp.sympify(v)  # made exact at the end, where it was written so

    def leaf(self, x: Term) -> sp.Expr:
        if x.op == "sum":
            return self.linear(x)
        if self._is_channel(x):
            return self.channel(x)
        if x.op == "a":
            raise No(f"an expert's activation reads something else than its up projections{reads(x)}")
        raise No(f"an expert's activation holds {_SAID.get(x.op, x.op)}{reads(x)}")

    def failure(self, name: str) -> Exception:
        return No(f"no activation is known that uses {name}")

    def _is_channel(self, x: Term) -> bool:
        x = channels.bare(x) if self.integers else x
        return x.op == "a" and T.uses(x, self.expert) and T.uses(x, self.i) and not T.uses(x, self.t)

    def _inverse(self, x: Term) -> sp.Expr | None:
        """(1 / s)^n, a power of the symbol of 1 / s, for a scale s of a weight in few bits."""
        if not self.integers or x.op != "pow" or not isinstance(x.args[1], int) or x.args[1] >= 0 or not self._is_own_scale(x.args[0]):
            return None
        return self.channel(T.power(x.args[0], -1)) ** -x.args[1]

    def channel(self, x: Term) -> sp.Symbol:
        return _symbol_of(x, self.channels, "s", real=True)

    def routed(self) -> bool:
        """Whether a value that is no number multiplies something inside."""
        return any(x.op != "c" for x in self.scalars.values())

    def scalar(self, x: Term) -> sp.Expr:
        """A value that is the same for all features: factor by factor a symbol."""
        if (inverse := self._inverse(x)) is not None:
            return inverse
        if self.integers and channels.for_expert(x, self.expert):
            return self.channel(x)
        if x.op in ("mul", "pow"):
            return self.arithmetic(x, self.read)
        if T.uses(x, self.expert) and not (x.op == "a" and len(x.args[1]) == 1):
            raise No(f"an expert's inside reads a parameter that is no projection{reads(x)}")
        return self.symbol(x)

    def symbol(self, x: Term) -> sp.Symbol:
        return _symbol_of(x, self.scalars, "w", positive=True)

    def add(self, x: Term) -> sp.Expr:
        """A sum of pointwise terms, where `c Σ_m ... + b[e, i]` is one projection with its bias."""
        common, *others = {T.coefficient(a)[0] for a in x.args}
        if not others and common != 1:  # -(Σ + b) comes as -Σ - b
            return self.number(common) * self.read(T.add(*(T.coefficient(a)[1] for a in x.args)))
        pairs = adapters.beside_others(x, self.i, self.expert)
        if pairs:
            return self.with_pairs(list(pairs.values()), [a for a in x.args if a not in pairs])
        biases = [a for a in x.args if a.op == "a" and T.uses(a, self.i)]
        if not biases:
            return sp.Add(*(self.read(a) for a in x.args))
        projections = [a for a in x.args if self._is_projection(a)]
        rest = [self.read(a) for a in x.args if a not in projections and a not in biases]
        if len(projections) != 1 or len(biases) != 1:
            raise No("a bias that belongs to no single projection")
        return sp.Add(*rest, self.affine(projections[0], biases[0]))

    def with_pairs(self, pairs: list[adapters.Pair], parts: list[Term]) -> sp.Expr:
        """c (Σ_m x W + s Σ_r b Σ_m a x) [+ bias] + ...: the projection with its low-rank pairs is one symbol."""
        projections = [a for a in parts if self._is_projection(a)]
        biases = [a for a in parts if a.op == "a" and T.uses(a, self.i)]
        if len(projections) != 1 or len(biases) > 1:
            raise adapters.NoPair(adapters.APART)
        (s,) = (f for f in factors(projections[0]) if T.uses(f, self.i) and not self._is_channel(f))
        lin, number = self.projection(s)
        own = [f for f in factors(projections[0]) if self._is_own_scale(f)]
        if own:  # W's own, not the pair's
            lin.channel = channels.channel(T.mul(*own), self.i, self.expert, lin.stride, lin.offset)
        scale = number * sp.Mul(*(self.read(f) for f in factors(projections[0]) if f is not s and f not in own))
        self.tokens += [pair.tokens() for pair in pairs]
        lin.pair = adapters.added([p.beside(lin, self._value(sp.Mul(*(self.read(f) for f in p.others)) / scale)) for p in pairs])
        rest = [self.read(a) for a in parts if a not in projections and a not in biases]
        if biases:
            return sp.Add(*rest, self.biased(lin, biases[0], scale))
        return sp.Add(*rest, scale * self.name(lin))

    def _is_own_scale(self, f: Term) -> bool:
        """Whether a factor is a scale of a weight in few bits: of channels, or of the whole matrix."""
        return self._is_channel(f) or self.integers and channels.for_expert(channels.bare(f), self.expert)

    def _value(self, e: sp.Expr) -> sp.Expr:
        """A number where numbers had symbols."""
        return sp.cancel(e.subs({s: self.number(x.args[0]) for s, x in self.scalars.items() if x.op == "c"}))

    def _is_projection(self, a: Term) -> bool:
        inside = [f for f in factors(a) if T.uses(f, self.i) and not self._is_channel(f)]
        return len(inside) == 1 and inside[0].op == "sum"

    def affine(self, a: Term, bias: Term) -> sp.Symbol:
        """c Σ_m x W + b as one symbol: the projection, with its bias, of c x."""
        (s,) = (f for f in factors(a) if T.uses(f, self.i) and not self._is_channel(f))
        lin, number = self.projection(s)
        return self.biased(lin, bias, number * sp.Mul(*(self.read(f) for f in factors(a) if f is not s)))

    def biased(self, lin: Linear, bias: Term, scale: sp.Expr) -> sp.Symbol:
        """scale · Σ_m x W + b as one symbol."""
        if bias.args[1][0] is not self.expert or len(bias.args[1]) != 2 or affine(bias.args[1][1], self.i) != (lin.stride, lin.offset):
            raise No("a bias is not laid out like its projection")
        lin.bias, lin.scale = bias.args[0], scale
        return self.name(lin)

    def linear(self, s: Term) -> sp.Expr:
        """Σ_m c x W as c times a symbol."""
        lin, number = self.projection(s)
        return number * self.name(lin)

    def projection(self, s: Term) -> tuple[Linear, sp.Expr]:
        """Σ_m c x[t,m] W[e,i,m]: the projection, and the number c as a symbol (1 if there is none)."""
        m, inner = s.args
        fs = factors(inner)
        ws = [f for f in fs if grids.belongs(f, self.expert)]
        numbers = [f for f in fs if f.op == "c"]
        xs = [f for f in fs if f not in ws and f not in numbers]
        parts = grids.split(ws)
        if parts is None or len(xs) != 1 or xs[0].op != "a":
            if (why := _why_no_matrix(fs, self.i, m, self.expert)) is not None:
                raise No(why)
            if any(f.op == "sum" for x in xs for f in T.walk(x)):
                raise No(f"{NO_CHAIN}{reads(s)}")
            if len(xs) == 1 and xs[0].op == "ite":
                where = "parts whose features lie in different orders"
                raise No(f"the rows that experts get are put together from {where}: they are not read as rows of one tensor{reads(s)}")
            raise No(f"a projection is not token times weight{reads(s)}")
        self.tokens.append(T.subst(xs[0], {m: T.named("m", m.args[1])}))
        return linear_of(parts, self.i, m, self.expert, fs), sp.Mul(*(self.symbol(f) for f in numbers))

    def name(self, lin: Linear) -> sp.Symbol:
        key = (lin.weight, lin.stride, lin.offset, lin.bias, lin.scale, lin.pair, lin.grid, lin.channel)
        if key not in self.by_key:
            symbol = sp.Symbol(f"L{len(self.by_key)}", real=True)
            self.by_key[key] = symbol
            self.linears[symbol] = lin
        return self.by_key[key]
