"""Reading with few experts in place of many and narrow matrices in place of wide ones: what is read is written down for all of them.

The cost of a recording grows with the experts in it. Where a module has many, it is recorded as if it had few: stacks, lists and numbers of
the experts' count are cut down to a prime that divides no other size. The paths of the others' parameters follow from those of the few.
It grows with the widths too, which are told by where they stand (`narrow`). What was read is tried on all experts, and at the real widths.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from ..ir import Experts, Rejection
from .narrow import WIDE

MANY = 40  # experts beyond which it pays
LIMIT = 320  # experts up to which all are recorded if few do not tell


class Fewer(NamedTuple):
    """`few` experts stand for `all`, and narrow sizes for wide ones: pairs of (wide, narrow)."""

    few: int
    all: int
    widths: tuple[tuple[int, int], ...] = ()

    @property
    def cuts(self) -> bool:
        """Whether there are fewer experts."""
        return self.few != self.all

    def shape(self, shape: Sequence[Any], single: bool = False) -> tuple[Any, ...]:
        """A shape with few experts and narrow. They are the leading dim of stacks, any dim of matrices and lists, none of one expert's (`single`)."""
        widths, stack = dict(self.widths), len(shape) > 2

        def cut(i: int, d: Any) -> Any:
            if d == self.all and not single and (not i or not stack):
                return self.few
            return d if not i and stack or len(shape) < 2 and not _wide(d) else widths.get(d, d)

        return tuple(cut(i, d) for i, d in enumerate(shape))

    def number(self, v: int) -> int:
        """A number that the code reads."""
        return self.few if v == self.all else dict(self.widths).get(v, v) if _wide(v) else v

    def experts(self, experts: Experts) -> Experts:
        """The experts read, as many as there are and as wide as they are."""
        if self.cuts and (experts.num_experts != self.few or experts.num_identity):
            raise Rejection("only some of its experts were recovered", stage="read")
        wider = experts.resized({narrow: wide for wide, narrow in self.widths})
        return replace(wider, num_experts=self.all) if self.cuts else wider

    def size(self, v: int) -> int:
        """A number of the recording, as it is with all experts (of which it may be a multiple) and at the real widths."""
        back = {narrow: wide for wide, narrow in self.widths if _wide(wide)}
        if v == self.few:
            return self.all
        return back[v // self.few] * self.all if v % self.few == 0 and v // self.few in back else back.get(v, v)

    def paths(self, module: nn.Module | None, paths: Sequence[str]) -> list[str]:
        """Paths of all experts' parameters, from those of the few: they differ in the key of one container."""
        parts = [p.split(".") for p in paths]
        differs = [i for i, names in enumerate(zip(*parts, strict=True)) if len(set(names)) > 1]
        if module is None or len(differs) != 1:
            raise Rejection("the parameters of its experts have no order", stage="read")
        before, after = parts[0][: differs[0]], parts[0][differs[0] + 1 :]
        container = module.get_submodule(".".join(before))
        keys = list(container._modules if after else container._parameters)
        if len(keys) != self.all or [p[differs[0]] for p in parts] != keys[: self.few]:
            raise Rejection("the parameters of its experts have no order", stage="read")
        return [".".join([*before, k, *after]) for k in keys]


def pattern(path: str) -> str:
    """A path without its numbers."""
    return re.sub(r"\d+", "#", path)


def _wide(d: Any) -> bool:
    return isinstance(d, int) and d >= WIDE
