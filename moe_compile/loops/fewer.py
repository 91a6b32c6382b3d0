"""Reading with few experts in place of many and narrow matrices in place of wide ones: what is read is written down for all of them.

The cost of a recording grows with the experts in it. Where a module has many, it is recorded as if it had few: stacks, lists and numbers of
the experts' count are cut down to a prime that divides no other size. The paths of the others' parameters follow from those of the few.
It grows with the widths too, which are told by where they stand (`narrow`). What was read is tried on all experts, and at the real widths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ir import Experts, Rejection, Stored
from .narrow import WIDE

MANY = 40  # experts beyond which it pays
LIMIT = 320  # experts up to which all are recorded if few do not tell


class Fewer(NamedTuple):
    """`few` experts stand for `all`, and narrow sizes for wide ones: pairs of (wide, narrow).

    weighted: (all, few) of the experts with weights, where there are others that give rows back as they are.
    """

    few: int
    all: int
    widths: tuple[tuple[int, int], ...] = ()
    weighted: tuple[int, int] | None = None

    @property
    def counts(self) -> dict[int, int]:
        """Numbers of experts: all -> few."""
        return {self.all: self.few, **dict([self.weighted] if self.weighted else [])}

    @property
    def own(self) -> tuple[int, int]:
        """(all, few) of the experts with weights."""
        return self.weighted or (self.all, self.few)

    @property
    def cuts(self) -> bool:
        """Whether there are fewer experts."""
        return self.few != self.all

    def shape(self, shape: Sequence[Any], single: bool = False) -> tuple[Any, ...]:
        """A shape with few experts, and narrow. Experts are the leading dim of stacks, any dim of matrices; one of them has none."""
        widths, counts, stack = dict(self.widths), self.counts, len(shape) > 2

        def cut(i: int, d: Any) -> Any:
            if d in counts and not single and (not i or not stack):
                return counts[d]
            return d if not i and stack or len(shape) < 2 and not _wide(d) else widths.get(d, d)

        return tuple(cut(i, d) for i, d in enumerate(shape))

    def number(self, v: int) -> int:
        """A number that the code reads."""
        (every, few), counts = self.own, self.counts
        if v in counts or self.weighted and v == self.all - every:
            return counts.get(v, self.few - few)
        return dict(self.widths).get(v, v) if _wide(v) else v

    def table(self, cut: Tensor, whole: Tensor) -> Tensor:
        """A table of numbers that was cut: one that says the group of each column says one of the groups that are left."""
        length, left = (t.shape[-1] if t.ndim else 0 for t in (whole, cut))
        if left == length or not cut.numel() or cut.dtype is torch.bool:
            return cut
        groups = int(whole.max()) + 1
        few = dict(self.widths).get(groups, groups)
        return cut % few if few < groups and length % groups == 0 else cut

    def experts(self, experts: Experts) -> Experts:
        """The experts read, as many as there are and as wide as they are."""
        every, few = self.own
        if self.cuts and (experts.num_experts, experts.num_identity) != (few, self.few - few):
            raise Rejection("only some of its experts were recovered", stage="read")
        back = {narrow: wide for wide, narrow in self.widths}
        halves = {narrow // 2: wide // 2 for wide, narrow in self.widths if _wide(wide)}  # gate and up lie in one packed matrix
        wider = _with_groups(experts.resized({**halves, **back}), back)
        return replace(wider, num_experts=every, num_identity=self.all - every) if self.cuts else wider

    def size(self, v: int) -> int:
        """A number of the recording, as it is with all experts (of which it may be a multiple) and at the real widths."""
        back = {narrow: wide for wide, narrow in self.widths if _wide(wide)}
        if v in (counts := {few: every for every, few in self.counts.items()}):
            return counts[v]
        return back[v // self.few] * self.all if v % self.few == 0 and v // self.few in back else back.get(v, v)

    def view(self, shape: Sequence[int], view: Sequence[int]) -> list[int]:
        """A view of a tensor of the recording, as it is of the real one: what is made of several dims is their product."""
        back, left = {narrow: wide for wide, narrow in self.widths}, list(shape)
        found: list[int] = []
        for size in view:
            merged: list[int] = []
            while left and math.prod(merged) < size:
                merged.append(left.pop(0))
            several = len(merged) > 1 and math.prod(merged) == size and self.few not in merged
            found.append(math.prod(back.get(d, d) for d in merged) if several else self.size(size))
        return found

    def paths(self, module: nn.Module | None, paths: Sequence[str]) -> list[str]:
        """Paths of all experts' parameters, from those of the few: they differ in the key of one container."""
        parts, (every, few) = [p.split(".") for p in paths], self.own
        differs = [i for i, names in enumerate(zip(*parts, strict=True)) if len(set(names)) > 1]
        if module is None or len(differs) != 1:
            raise Rejection("the parameters of its experts have no order", stage="read")
        before, after = parts[0][: differs[0]], parts[0][differs[0] + 1 :]
        container = module.get_submodule(".".join(before))
        keys = list(container._modules if after else container._parameters)
        if len(keys) != every or [p[differs[0]] for p in parts] != keys[:few]:
            raise Rejection("the parameters of its experts have no order", stage="read")
        return [".".join([*before, k, *after]) for k in keys]


def _with_groups(experts: Experts, known: Mapping[int, int]) -> Experts:
    """The same experts where the index of a packed matrix names other numbers of groups: old -> new."""

    def wider(how: Stored | None) -> Stored | None:
        return replace(how, groups=known.get(how.groups, how.groups)) if how is not None and how.indexed else how

    return replace(experts, up_stored=wider(experts.up_stored), down_stored=wider(experts.down_stored))


def pattern(path: str) -> str:
    """A path without its numbers."""
    return re.sub(r"\d+", "#", path)


def _wide(d: Any) -> bool:
    return isinstance(d, int) and d >= WIDE
