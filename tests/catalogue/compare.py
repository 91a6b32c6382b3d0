"""Comparing meanings: field by field, after the few identities that leave a choice of IR.

A Gating has more than one way to say some things, and any of them is right:
softmax over the selected logits is softmax, top-k, renormalise; a pointwise score may come before or after the gather; a
1-norm of scores that are not negative is their sum; a guard smaller than any sum of top softmax scores is none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import sympy as sp

from moe_compile.ir import BiasOn, Experts, Form, Gating, Norm, Normaliser, Score, SharedExpert

from . import naive

POINTWISE = {Score.IDENTITY, Score.SIGMOID, Score.SQRT_SOFTPLUS, Score.SOFTPLUS, Score.EXP, Score.TANH, Score.RELU}
NOT_NEGATIVE = {Score.SOFTMAX, Score.SIGMOID, Score.SQRT_SOFTPLUS, Score.SOFTPLUS, Score.EXP, Score.RELU}


def normal(g: Gating) -> Gating:
    """One of the equal ways to say it."""
    norm = g.norm
    if norm is not None and norm.kind is Norm.NONE:
        norm = None
    if norm is not None and norm.kind is Norm.PNORM and norm.p == 1.0 and g.score in NOT_NEGATIVE and not g.bias_in_weights:
        norm = dataclasses.replace(norm, kind=Norm.SUM)
    scale = g.scale
    if norm is not None and norm.kind is Norm.EXPR:  # a factor may stand inside the expression or beside it
        norm, scale = dataclasses.replace(norm, expr=norm.expr * scale), 1.0
    free = g.bias is BiasOn.NONE and g.groups is None
    if norm is not None and free and g.score is Score.SOFTMAX and norm.kind is Norm.SUM and norm.clamp_min < g.k / g.num_experts:
        norm = dataclasses.replace(norm, clamp_min=0.0)
    selected = g.score_over_selected
    if selected and g.score is Score.SOFTMAX and norm is None and free:
        selected, norm = False, Normaliser(Norm.SUM)
    if selected and g.score in POINTWISE and (free or g.bias is BiasOn.LOGIT):
        selected = False
    return dataclasses.replace(g, norm=norm, scale=scale, score_over_selected=selected)


def same_activation(a: Any, b: Any) -> bool:
    """Equal as functions: on a grid that passes every clamp, and beyond."""
    rng = np.random.default_rng(0)
    g, u = rng.normal(size=4000) * 4, rng.normal(size=4000) * 4
    return np.allclose(naive.activation(a, g, u), naive.activation(b, g, u), rtol=1e-9, atol=1e-12)


def swapped(expr: Any) -> Any:
    """The expression with the two projections renamed."""
    g, u = sp.symbols("g u", real=True)
    return expr.subs({g: u, u: g}, simultaneous=True)


def same_normaliser_expression(a: Any, b: Any) -> bool:
    rng = np.random.default_rng(0)
    for _ in range(50):
        w = rng.uniform(0.01, 1.0, size=3).tolist()
        values = [naive.normalised(Normaliser(Norm.EXPR, expr=e), w) for e in (a, b)]
        if not np.allclose(*values, rtol=1e-9):
            return False
    return True


def equal(a: Any, b: Any) -> bool:
    """Numbers up to the rounding of constants (float32 constants in graphs), everything else exactly."""
    if isinstance(a, float) and isinstance(b, float):
        return a == b or math.isclose(a, b, rel_tol=1e-6)
    return a == b


def differing(a: Any, b: Any, path: str) -> set[str]:
    """Field paths in which two values of one dataclass differ."""
    if a is None or b is None or type(a) is not type(b) or not dataclasses.is_dataclass(a):
        return set() if equal(a, b) else {path}
    out: set[str] = set()
    for f in dataclasses.fields(a):
        x, y, where = getattr(a, f.name), getattr(b, f.name), f"{path}.{f.name}"
        if f.name == "activation":
            may_swap = isinstance(a, SharedExpert) or (isinstance(a, Experts) and a.form is Form.SEPARATE)
            if not (same_activation(x, y) or (may_swap and same_activation(x, swapped(y)))):
                out.add(where)
        elif f.name == "expr" and x is not None and y is not None:
            if not same_normaliser_expression(x, y):
                out.add(where)
        else:
            out |= differing(x, y, where)
    return out


def gating_differences(a: Gating | None, b: Gating | None) -> set[str]:
    if a is None or b is None:
        return set() if a is b else {"gating"}
    return differing(normal(a), normal(b), "gating")


def experts_differences(a: Experts, b: Experts, any_layout: bool = False, any_mapped: bool = False) -> set[str]:
    found = differing(a, b, "experts")
    layout = {"experts.stacked", "experts.form", "experts.up_transposed", "experts.down_transposed"}
    return found - (layout if any_layout else set()) - ({"experts.ids_mapped"} if any_mapped else set())


def shared_differences(a: SharedExpert | None, b: SharedExpert | None) -> set[str]:
    return differing(a, b, "shared")


def fields_of(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a record of records: (path, value)."""
    if not dataclasses.is_dataclass(value):
        yield name, value
        return
    for f in dataclasses.fields(value):
        if f.compare:
            yield from fields_of(getattr(value, f.name), f"{name}.{f.name}")
