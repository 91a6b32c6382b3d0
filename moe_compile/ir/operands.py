"""The parameters of experts in one bundle, whatever stands for them on the way: terms' nodes, names in a plan, nodes, tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")

# Which parameters an op takes, in the order of its lists
PLAIN = ("up", "down", "up_bias", "down_bias")
_OF_CODES = ("scale", "zero", "table", "second", "group", "smooth")
CODED = (*PLAIN, *(f"{name}_{what}" for what in _OF_CODES for name in ("up", "down")))
ADAPTED = (*PLAIN, "up_a", "up_b", "down_a", "down_b")
STORED_ADAPTED = (*CODED, *ADAPTED[len(PLAIN) :])
CHAINED = ("parts",)


@dataclass(frozen=True)
class Operands(Generic[T]):
    """One stack (two for `Form.SEPARATE`), or as many matrices as there are experts, for each parameter; nothing where there is none.

    A table is one for all; where codes are shifted by numbers that a tensor holds (`Stored.shifted`) there are as many as tensors of codes,
    and behind them as many for packed zero points. One for all may also be an index of blocks (`group`) beside stacks: one for each of
    these. Smooth scales, numbers of a projection's inputs, are [E, in] or a list like the weights, or one [in] for all. Low-rank pairs
    stand beside the projections that have one: `a` [E, r, in] and `b` [E, out, r], whatever way the weights are stored. `parts`: all
    parameters of experts that are a chain, as its kinds say (`ir.chain`); there are no others then.
    """

    up: tuple[T, ...] = ()
    down: tuple[T, ...] = ()
    up_bias: tuple[T, ...] = ()
    down_bias: tuple[T, ...] = ()
    up_scale: tuple[T, ...] = ()
    down_scale: tuple[T, ...] = ()
    up_zero: tuple[T, ...] = ()
    down_zero: tuple[T, ...] = ()
    up_table: tuple[T, ...] = ()
    down_table: tuple[T, ...] = ()
    up_second: tuple[T, ...] = ()
    down_second: tuple[T, ...] = ()
    up_group: tuple[T, ...] = ()
    down_group: tuple[T, ...] = ()
    up_smooth: tuple[T, ...] = ()
    down_smooth: tuple[T, ...] = ()
    up_a: tuple[T, ...] = ()
    up_b: tuple[T, ...] = ()
    down_a: tuple[T, ...] = ()
    down_b: tuple[T, ...] = ()
    parts: tuple[T, ...] = ()

    @classmethod
    def of(cls, holder: Any) -> Operands[T]:
        """Those of an object that has them as lists of the same names."""
        return cls(**{f.name: tuple(getattr(holder, f.name, ())) for f in fields(cls)})

    @classmethod
    def named(cls, **groups: Iterable[T]) -> Operands[T]:
        """Of lists by name. Raises TypeError where there is no such parameter."""
        return cls(**{name: tuple(group) for name, group in groups.items()})

    @classmethod
    def read(cls, lists: Iterable[Iterable[T]], names: Sequence[str] = PLAIN) -> Operands[T]:
        """Of an op's lists: the inverse of `lists`."""
        return cls(**{name: tuple(group) for name, group in zip(names, lists, strict=True)})

    def lists(self, names: Sequence[str] = PLAIN) -> list[list[T]]:
        """As an op takes them."""
        return [list(getattr(self, name)) for name in names]

    def map(self, f: Callable[[T], U]) -> Operands[U]:
        """Each through `f`, in the order of the iteration."""
        return Operands(*(tuple([f(x) for x in group]) for group in self.groups()))

    def filled(self, values: Iterable[U]) -> Operands[U]:
        """The first of `values`, in the order of the iteration, in the places of these."""
        rest = iter(values)
        return self.map(lambda _: next(rest))

    def groups(self) -> tuple[tuple[T, ...], ...]:
        """Up, down, their biases, their scales, their low-rank pairs."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def of_experts(self) -> Operands[T]:
        """Those of which each expert has its own, tables and indexes of blocks apart."""
        return replace(self, up_table=(), down_table=(), up_group=(), down_group=())

    def by_name(self) -> dict[str, tuple[T, ...]]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __iter__(self) -> Iterator[T]:
        return (x for group in self.groups() for x in group)


@dataclass(frozen=True)
class Join:
    """Several low-rank pairs of a projection as one:  Σ_i s_i b_i (a_i x) = s_0 [b_0, b_1 s_1/s_0, ...] ([a_0; a_1; ...] x).

    `up` (one for each part that has pairs) and `down` (one, or none): s_i / s_0 of the pairs, which stand one after the other in the
    lists of `Operands`, `each` matrices a pair.
    """

    up: tuple[tuple[float, ...], ...]
    down: tuple[tuple[float, ...], ...]
    each: int

    def of(self, p: Operands[T], rows: Callable[[list[T]], T], columns: Callable[[list[T], Sequence[float]], T]) -> Operands[T]:
        """One pair for each projection. `rows`: matrices one below the other; `columns`: side by side, each times its number."""

        def joined(group: tuple[T, ...], parts: tuple[tuple[float, ...], ...], both: Callable[[list[T], Sequence[float]], T]) -> list[T]:
            out, at = [], 0
            for numbers in parts:
                pairs = [group[at + i * self.each : at + (i + 1) * self.each] for i in range(len(numbers))]
                out += [both(list(same), numbers) if len(numbers) > 1 else same[0] for same in zip(*pairs, strict=True)]
                at += self.each * len(numbers)
            return out

        a = {f"{n}_a": tuple(joined(getattr(p, f"{n}_a"), getattr(self, n), lambda ts, _: rows(ts))) for n in ("up", "down")}
        return replace(p, **a, **{f"{n}_b": tuple(joined(getattr(p, f"{n}_b"), getattr(self, n), columns)) for n in ("up", "down")})
