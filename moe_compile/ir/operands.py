"""The parameters of experts in one bundle, whatever stands for them on the way: terms' nodes, names in a plan, nodes, tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Operands(Generic[T]):
    """One stack (two for `Form.SEPARATE`), or as many matrices as there are experts, for each parameter; nothing where there is none."""

    up: tuple[T, ...]
    down: tuple[T, ...]
    up_bias: tuple[T, ...] = ()
    down_bias: tuple[T, ...] = ()
    up_scale: tuple[T, ...] = ()
    down_scale: tuple[T, ...] = ()

    @classmethod
    def of(cls, holder: Any) -> Operands[T]:
        """Those of an object that has them as lists of the same names."""
        return cls(**{f.name: tuple(getattr(holder, f.name, ())) for f in fields(cls)})

    def map(self, f: Callable[[T], U]) -> Operands[U]:
        """Each through `f`, in the order of the iteration."""
        return Operands(*(tuple([f(x) for x in group]) for group in self.groups()))

    def groups(self) -> tuple[tuple[T, ...], ...]:
        """Up, down, their biases, their scales: the order in which ops take them."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def by_name(self) -> dict[str, tuple[T, ...]]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __iter__(self) -> Iterator[T]:
        return (x for group in self.groups() for x in group)
