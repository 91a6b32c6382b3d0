"""Random terms that are well formed, and random worlds in which they have values."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy as sp
from evaluate import World, evaluate, places_of, same_value

import moe_compile.passes.terms as T
from moe_compile.passes.terms.arithmetic import build
from moe_compile.passes.terms.term import Term

S0, S1 = sp.Symbol("s0", integer=True, positive=True), sp.Symbol("s1", integer=True, positive=True)
FUNCTIONS = ("sigmoid", "exp", "relu", "abs", "tanh", "log1p", "expm1", "log", "round", "softplus", "erf", "gelu_tanh")


@dataclass(eq=False)
class Tensor:
    """A tensor by name: floats, or whole numbers below `whole` (of which some may be -1)."""

    number: int
    shape: tuple[Any, ...]
    whole: int = 0
    negative: bool = False

    def __repr__(self) -> str:
        return f"X{self.number}<{','.join(map(str, self.shape))}>"


@dataclass(eq=False)
class Choice:
    """A top-k of `slots` different ones of `extent` experts, for each row."""

    number: int
    shape: tuple[Any, ...]
    extent: int

    def __repr__(self) -> str:
        return f"K{self.number}<{','.join(map(str, self.shape))} of {self.extent}>"


@dataclass(eq=False)
class Mask:
    name: str
    shape: tuple[Any, ...]
    at: Callable[[tuple[Term, ...]], Term]

    def __repr__(self) -> str:
        return self.name


class Source:
    """Random terms. `symbolic`: some sizes are symbols. All tensors are read through the same few nodes."""

    def __init__(self, seed: int, symbolic: bool = False) -> None:
        self.r = random.Random(seed)
        self.symbolic = symbolic
        self.facts = T.facts()
        self.count = 0
        self.tensors: list[Tensor] = []
        self.rows: dict[str, Mask] = {}  # the numbers of true elements that sums run over

    # ---- pieces ----

    def one_of(self, *options: Callable[[], Any]) -> Any:
        return self.r.choice(options)()

    def chance(self, p: float) -> bool:
        return self.r.random() < p

    def size(self, least: int = 1) -> Any:
        if self.symbolic and self.chance(0.3):
            return self.r.choice((S0, S1, 2 * S0, 3 * S0, S0 * S1))
        return self.r.randint(least, 5)

    def number(self) -> Any:
        return self.r.choice((0, 1, 1, 2, 3, -1, -2, 0.5, 1.5))

    def next(self) -> int:
        self.count += 1
        return self.count

    def var(self, size: Any = None, name: str = "v") -> Term:
        return T.var(self.size() if size is None else size, name)

    def tensor(self, *shape: Any, whole: int = 0, negative: bool = False) -> Tensor:
        self.tensors.append(Tensor(self.next(), shape, whole, negative))
        return self.tensors[-1]

    def weight(self, *shape: Any) -> Tensor:
        """An expert weight: the axiom holds for it."""
        w = self.tensor(*shape)
        self.facts.zero_beyond[w] = shape
        return w

    def choice(self, *shape: Any, extent: int | None = None) -> Choice:
        """A top-k; the last dim of its shape are the slots."""
        slots = shape[-1] if isinstance(shape[-1], int) else 1
        c = Choice(self.next(), (*shape[:-1], slots), max(slots, extent or self.r.randint(1, 5)))
        self.facts.know(c, c.extent)
        return c

    def sort(self, size: Any = None) -> tuple[str, Term]:
        """A sort of whole numbers: its node and its key."""
        n = self.size(2) if size is None else size
        node, q = f"S{self.next()}", T.named(T.Q, n)
        self.facts.know(node, n)
        k = self.r.randint(1, 3)
        key = self.one_of(
            lambda: T.atom(self.tensor(n, whole=self.r.randint(1, 4)), (q,)),
            lambda: T.mk("topk", self.choice(5, k), (T.fdiv(q, k), T.mod(q, k))) if isinstance(n, int) else T.mod(q, 2),
            lambda: T.mod(q, self.r.randint(2, 3)),
        )
        return node, T.canonical(key)

    def mask(self, *shape: Any) -> Mask:
        places = [T.named(f"m{d}", s) for d, s in enumerate(shape)]
        body = T.normal(self.truth(places, 1))
        if body.atoms - set(places):
            body = T.eq(T.atom(self.tensor(*shape, whole=2), tuple(places)), T.const(1))
        return Mask(f"M{self.next()}", shape, lambda idx: T.subst(body, dict(zip(places, idx))))

    def rows_of(self, mask: Mask) -> str:
        """The size of a variable that counts a mask's true elements."""
        self.rows[f"rows:{mask}"] = mask
        return f"rows:{mask}"

    # ---- terms ----

    def index(self, vs: list[Term], depth: int = 2) -> Term:
        """A whole number."""
        if depth <= 0 or self.chance(0.25):
            return self.one_of(lambda: T.const(self.r.randint(-1, 5)), *[lambda v=v: v for v in vs for _ in range(3)])
        inner = lambda: self.index(vs, depth - 1)  # noqa: E731
        return self.one_of(
            lambda: build("add", inner(), inner()),
            lambda: build("mul", T.const(self.r.choice((-1, 2, 3, 4, 6))), inner()),
            lambda: self.affine(vs),
            lambda: T.mk("fdiv", self.affine(vs), T.const(self.size())),
            lambda: T.mk("mod", self.affine(vs), T.const(self.size())),
            lambda: T.mk("fdiv", inner(), T.const(self.r.choice((1, 2, 3, 4, 6, 8, 12)))),
            lambda: T.mk("mod", inner(), T.const(self.r.choice((1, 2, 3, 4, 6, 8, 12)))),
            lambda: self.choose(vs),
            lambda: T.atom(self.tensor(self.size(), whole=self.r.randint(1, 5), negative=self.chance(0.3)), (inner(),)),
            lambda: T.mk("ite", self.truth(vs, depth - 1), inner(), inner()),
            lambda: self.sorted_place(vs, depth - 1),
            lambda: T.mk("fn", "clamp", (inner(),), (float(self.r.randint(-1, 1)), float(self.r.randint(1, 4)))),
        )

    def affine(self, vs: list[Term]) -> Term:
        """k u + v, as flattened indices are."""
        if not vs:
            return T.const(self.r.randint(0, 9))
        parts = [
            build("mul", T.const(self.r.choice((1, v.args[1], self.r.randint(1, 6)))), u)
            for u, v in (self.r.choices(vs, k=2) for _ in range(2))
        ]
        return build("add", *parts[: self.r.randint(1, 2)], self.r.choice(vs), T.const(self.r.choice((0, 0, 0, 1, 3, 7, -1))))

    def choose(self, vs: list[Term]) -> Term:
        c = self.choice(self.size(), self.r.randint(1, 3))
        return T.mk("topk", c, (self.index(vs, 0), self.index(vs, 0)))

    def sorted_place(self, vs: list[Term], depth: int) -> Term:
        node, key = self.sort()
        p = self.index(vs, depth)
        return self.one_of(
            lambda: T.mk("perm", node, key, p),
            lambda: T.mk("inv", node, key, p),
            lambda: T.mk("sv", key, p),
            lambda: T.mk("perm", node, key, T.mk("inv", node, key, p)),
            lambda: T.mk("sv", key, T.mk("inv", node, key, p)),
        )

    def truth(self, vs: list[Term], depth: int = 2) -> Term:
        index = lambda: self.index(vs, depth - 1)  # noqa: E731
        if depth <= 0 or self.chance(0.4):
            return self.one_of(lambda: build("eq", index(), index()), lambda: T.mk("lt", index(), index()))
        v = self.var()
        return self.one_of(
            lambda: T.mk("not", self.truth(vs, depth - 1)),
            lambda: build("mul", self.truth(vs, depth - 1), self.truth(vs, depth - 1)),
            lambda: T.mk("any", v, self.truth([*vs, v], depth - 1)),
            lambda: build("eq", T.mk("sum", v, self.truth([*vs, v], depth - 1)), T.const(self.r.choice((0, 0, 1)))),
            lambda: build("eq", self.truth(vs, depth - 1), T.const(self.r.choice((0, 1, 2)))),
            lambda: T.mk("lt", index(), T.const(self.r.randint(0, 6))),
            lambda: build("eq", T.mk("fdiv", self.choose(vs), T.const(self.r.randint(1, 3))), T.const(self.r.randint(0, 2))),
            lambda: T.mk("ite", self.truth(vs, depth - 1), T.const(self.r.randint(0, 1)), self.truth(vs, depth - 1)),
        )

    def element(self, vs: list[Term], depth: int = 1) -> Term:
        n = self.r.randint(1, 2)
        make = self.weight if self.chance(0.2) else self.tensor
        return T.atom(make(*(self.size(2) for _ in range(n))), tuple(self.index(vs, depth) for _ in range(n)))

    def value(self, vs: list[Term], depth: int = 3) -> Term:
        """A real number."""
        if depth <= 0:
            return self.one_of(lambda: T.const(self.number()), lambda: self.element(vs), lambda: self.element(vs))
        inner = lambda: self.value(vs, depth - 1)  # noqa: E731
        return self.one_of(
            lambda: self.element(vs, depth),
            lambda: build("add", inner(), inner()),
            lambda: build("mul", inner(), inner()),
            lambda: build("mul", self.truth(vs, depth - 1), inner()),
            lambda: build("pow", inner(), self.r.choice((-1, 2, 0.5, -2))),
            lambda: T.mk("fn", self.r.choice(FUNCTIONS), (inner(),), ()),
            lambda: T.mk("ite", self.truth(vs, depth - 1), inner(), self.one_of(inner, lambda: T.const(0), lambda: T.const(-float("inf")))),
            lambda: self.reduction(vs, depth),
            lambda: self.reduction(vs, depth),
            lambda: self.dispatch(vs, depth),
            lambda: self.dispatch(vs, depth),
        )

    def reduction(self, vs: list[Term], depth: int) -> Term:
        v = self.var()
        return T.mk(self.r.choice(("sum", "sum", "sum", "max", "min")), v, self.value([*vs, v], depth - 1))

    def dispatch(self, vs: list[Term], depth: int) -> Term:
        """The sums that dispatching tokens makes."""
        v, j = self.var(), self.var(self.r.randint(1, 3), "j")
        body = self.value([*vs, v], depth - 2)
        a = self.index(vs, 1)
        n = self.r.choice((1, 2, 3, 4, 6))
        slot = lambda: T.mk("topk", self.choice(self.size(), 3, extent=5), (self.index(vs, 0), j))  # noqa: E731
        cases = lambda: T.mk("ite", build("eq", v, T.const(self.r.randint(0, 3))), self.value(vs, 0), self.value(vs, 0))  # noqa: E731
        return T.mk("sum", v, build("mul", *self.one_of(
            lambda: (build("eq", v, a), body),
            lambda: (build("eq", T.mk("fdiv", v, T.const(n)), a), body),
            lambda: (build("eq", T.mk("mod", v, T.const(n)), a), body),
            lambda: (T.mk("sum", j, build("mul", build("eq", slot(), v), self.value([*vs, j], 0))), body),
            lambda: (T.mk("any", j, build("eq", slot(), v)), body),
            lambda: (cases(), body),
            lambda: (self.over_order(vs, v, depth),),
        )))  # fmt: skip

    def over_order(self, vs: list[Term], v: Term, depth: int) -> Term:
        """Something of the row that stands at v of a sorted order."""
        node, key = self.sort(v.args[1])
        p = self.var(v.args[1])
        body = self.value([*vs, p], max(0, depth - 2))
        mapping = {p: T.mk("perm", node, key, v)}
        out = T.let(body, mapping)
        return build("mul", build("eq", T.mk("sv", key, v), self.index(vs, 0)), out) if self.chance(0.5) else out

    # ---- worlds ----

    def world(self, seed: int) -> World:
        return RandomWorld(self, seed)


class RandomWorld(World):
    """Values for the nodes of a source: one number for each element, drawn when it is first read."""

    def __init__(self, source: Source, seed: int) -> None:
        r = random.Random(seed)
        super().__init__(self.element, self.chosen, {S0: r.randint(1, 4), S1: r.randint(1, 3)}, source.facts)
        self.seed, self.source, self.tables = seed, source, {}

    def size(self, s: Any) -> Any:
        return len(places_of(self.source.rows[s], self)) if s in self.source.rows else super().size(s)

    def element(self, node: Any, at: tuple[int, ...]) -> Any:
        if any(i != int(i) or not 0 <= i < self.size(s) for i, s in zip(at, node.shape)):
            return None
        key = (node, at)
        if key not in self.tables:
            drawn = hash((self.seed, node.number, *at)) & 0xFFFFFF
            least = -1 if node.negative else 0
            number = (drawn % 9 - 4) / (1 + drawn // 9 % 3 // 2)
            number = abs(number) + 1 if node in self.facts.positive else number
            self.tables[key] = least + drawn % (node.whole - least) if node.whole else number
        return self.tables[key]

    def chosen(self, node: Choice, at: tuple[int, ...]) -> Any:
        if any(i != int(i) or not 0 <= i < self.size(s) for i, s in zip(at, node.shape)):
            return None
        key = (node, at[:-1])
        if key not in self.tables:
            r = random.Random(hash((self.seed, node.number, *at[:-1])))
            self.tables[key] = r.sample(range(node.extent), node.shape[-1])
        return self.tables[key][int(at[-1])]

    def bind(self, t: Term, seed: int) -> dict[Term, int]:
        """A value in its range for each free variable."""
        r = random.Random(hash((self.seed, seed)))
        return {v: r.randrange(n) for v in sorted(t.atoms, key=lambda v: v.serial) if (n := self.size(v.args[1]))}


def difference(t: Term, made: Term, source: Source, evaluations: int, seed: int = 0) -> tuple[int, str]:
    """(how often t had a value, what is wrong with `made` in its place, or nothing)."""
    counted = 0
    for i in range(evaluations):
        if i % 3 == 0:
            world = source.world(seed + i)
        given = world.bind(t, i)
        want = evaluate(t, world, given, strict=True)
        if want is None:
            continue
        counted += 1
        got = evaluate(made, world, given)
        if not same_value(got, want):
            return counted, f"{T.show(t, 900)}\n  is {want}, but\n{T.show(made, 900)}\n  is {got}, where {given}, sizes {dict(world.sizes)}"
    return counted, ""
