"""Reading with few experts in place of many: what is read of 17 of them is written down for all, and tried on all.

The cost of a recording grows with the experts in it. Where a module has many, it is recorded as if it had few: stacks, lists and numbers of
the experts' count are cut down to a prime that divides no other size. The paths of the others' parameters follow from those of the few.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from ..ir import Experts, Rejection

MANY = 40  # experts beyond which it pays
LIMIT = 320  # experts up to which all are recorded if few do not tell


class Fewer(NamedTuple):
    """`few` experts stand for `all`."""

    few: int
    all: int

    def shape(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        """A shape with few experts: the leading dim of stacks, any dim of matrices and lists."""
        cut = [self.few if d == self.all else d for d in shape]
        return (cut[0], *shape[1:]) if len(shape) > 2 else tuple(cut)

    def experts(self, experts: Experts) -> Experts:
        """The experts read, as many as there are."""
        if experts.num_experts != self.few or experts.num_identity:
            raise Rejection("only some of its experts were recovered", stage="read")
        return replace(experts, num_experts=self.all)

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
