"""Which npu calls a recovered block may become: tables of laws, asked from top to bottom.

No row knows a model. A row says what it cannot express; the first one with nothing to say is taken. The last row takes everything.
s: scores, b: selection bias, w: routing weights, Σ: sum over the selected experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import sympy as sp
import torch

from ...ir import BiasOn, Form, Norm, Score
from ...ir import scalar as act
from ..reference.routing import Routing

MAX_GATED = 2048  # experts of npu_moe_gating_top_k
MAX_SOFTMAX_K = 1024
MAX_310P_TOKENS = 1024


@dataclass(frozen=True)
class Case:
    """A routing and where it is to run. tokens: None where the number is not fixed; device: a family of `device.family`."""

    r: Routing
    experts: int
    tokens: int | None = None
    device: str = ""


# every score function but ReLU, which is 0 for half of its arguments
INCREASING = frozenset(Score) - {Score.RELU}
Check = Callable[[Case], str | None]


@dataclass(frozen=True)
class Row:
    """One form of routing. `holds`: why the op is exact where nothing in `checks` objects."""

    name: str
    calls: str
    holds: str
    checks: tuple[Check, ...]

    def refuses(self, c: Case) -> str | None:
        """The first objection, or None."""
        return next((why for check in self.checks if (why := check(c)) is not None), None)

    def is_of(self, c: Case) -> bool:
        """Whether the row is of the routing's kind: what it objects to is then worth telling."""
        return all(check(c) is None for check in self.checks if check in _KINDS)


# ---- what can stand in the way -----------------------------------------------------------------------------------------


def _scored_in_fp32(c: Case) -> str | None:
    if c.r.score_dtype == torch.float32:
        return None
    return f"scores are computed in {c.r.score_dtype}, the op's in fp32: near ties would differ"


def _sigmoid(c: Case) -> str | None:
    return None if c.r.score == Score.SIGMOID else "the score is not a sigmoid"


def _softmax(c: Case) -> str | None:
    return None if c.r.score == Score.SOFTMAX else "the score is not a softmax"


def _before_selection(c: Case) -> str | None:
    return "the score is taken of the selected experts only" if c.r.score_over_selected else None


def _after_selection(c: Case) -> str | None:
    return None if c.r.score_over_selected else "the score is taken of all experts"


def _by_logits(c: Case) -> str | None:
    """f increasing: the k largest f(l) are those of the k largest l; where f rounds to ties the larger logit is as good as any."""
    return None if c.r.score_over_selected or c.r.score in INCREASING else "the score does not increase with the logit"


def _bias_selects(c: Case) -> str | None:
    """The op adds b to s for the selection and gathers s without it."""
    return _bias_on_scores(c) or ("the bias is part of the weights, the op's only selects" if c.r.bias_in_weights else None)


def _bias_on_scores(c: Case) -> str | None:
    """A bias inside the weights is added after the gather; one on the logits changes what is selected."""
    return "the bias is added to the logits, the op adds it to the scores" if c.r.bias_on == BiasOn.LOGIT else None


def _no_bias(c: Case) -> str | None:
    return None if c.r.bias_on == BiasOn.NONE else "the op takes no selection bias"


def _no_groups(c: Case) -> str | None:
    return "the op knows no groups" if c.r.n_groups else None


def _groups(c: Case) -> str | None:
    """Losing groups become -inf in the op. A fill of 0 is the same where no score is negative, that is without a bias."""
    r, n = c.r, c.experts
    if not r.n_groups:
        return None
    if n % r.n_groups:
        return f"{n} experts do not fall into {r.n_groups} equal groups"
    if r.group_top not in (1, 2):
        return f"a group's score is the sum of {r.group_top}, the op has the max and the sum of 2"
    if r.group_fill != -math.inf and not (r.group_fill == 0.0 and r.bias_on == BiasOn.NONE):
        return f"experts of losing groups get {r.group_fill}, the op gives them -inf"
    if r.k > r.kept_groups * n // r.n_groups:
        return "the kept groups hold fewer experts than are selected"
    if r.group_top == 2 and n // r.n_groups < 2:
        return "groups of one expert have no sum of 2"
    aligned = -(-(n // r.n_groups) // 32) * 32 * r.n_groups
    return f"groups aligned to 32 cover {aligned} experts, the op takes {MAX_GATED}" if aligned > MAX_GATED else None


def _gating_limits(c: Case) -> str | None:
    if c.experts > MAX_GATED:
        return f"{c.experts} experts, the op takes {MAX_GATED}"
    return None if 1 <= c.r.k <= c.experts else f"{c.r.k} of {c.experts} experts"


def _softmax_limits(c: Case) -> str | None:
    return None if 1 <= c.r.k <= min(c.experts, MAX_SOFTMAX_K) else f"{c.r.k} of {c.experts} experts, the op takes {MAX_SOFTMAX_K}"


def _softmax_devices(c: Case) -> str | None:
    """The first softmax op: gone from the 950, and INF for many tokens on the 310P (vllm-ascend 11391)."""
    if c.device == "950":
        return "npu_moe_gating_top_k_softmax is not supported on Ascend 950"
    if c.device == "310P" and (c.tokens is None or c.tokens > MAX_310P_TOKENS):
        return f"more than {MAX_310P_TOKENS} tokens give INF on Ascend 310P"
    return None


def _second_softmax_devices(c: Case) -> str | None:
    return "npu_moe_gating_top_k_softmax_v2 is not known to run on Ascend 310P" if c.device == "310P" else None


def _gating_devices(c: Case) -> str | None:
    return "npu_moe_gating_top_k is not known to run on Ascend 310P" if c.device == "310P" else None


def _renormalised(c: Case) -> str | None:
    """The sigmoid op always divides by Σ + eps."""
    if c.r.norm != Norm.SUM:
        return "weights are not divided by their sum, the op always does"
    return "the sum is clamped, the op adds an eps" if c.r.norm_clamp else None


def _not_scaled(c: Case) -> str | None:
    return "weights are scaled, the op has no scale" if c.r.scale != 1.0 and c.r.norm == Norm.NONE else None


_KINDS = (_sigmoid, _softmax, _before_selection, _after_selection)
_SOFTMAX = (_scored_in_fp32, _softmax, _before_selection, _no_bias, _no_groups, _softmax_limits)
ROUTING: tuple[Row, ...] = (
    Row(
        "sigmoid, renormalised",
        "npu_moe_gating_top_k(norm_type=1)",
        "s = σ(l); top-k of s + b; w = s / (Σ + eps) · scale: all inside the op, in fp32, eps and scale as recovered",
        (_scored_in_fp32, _sigmoid, _before_selection, _bias_selects, _groups, _gating_limits, _gating_devices, _renormalised),
    ),
    Row(
        "sigmoid, raw scores",
        "npu_moe_gating_top_k(norm_type=1, out_flag=True) + gather",
        "the op's weights are always renormalised: its ids are used and w is gathered from its scores; what follows is ATen",
        (_scored_in_fp32, _sigmoid, _before_selection, _groups, _gating_limits, _gating_devices, _bias_on_scores),
    ),
    Row(
        "softmax",
        "npu_moe_gating_top_k_softmax",
        "w = softmax(l)[top-k], never renormalised by the op: a normaliser and a scale follow as ATen, in this order",
        (*_SOFTMAX, _not_scaled, _softmax_devices),
    ),
    Row(
        "softmax, second op",
        "npu_moe_gating_top_k_softmax_v2(renorm=0)",
        "the same from the op's successor, for devices that have no other",
        (*_SOFTMAX, _not_scaled, _second_softmax_devices),
    ),
    Row(
        "softmax with bias, groups or scale",
        "npu_moe_gating_top_k(norm_type=0)",
        "top-k of s + b in the kept groups, w = s · scale; with a normaliser the op's scale is 1 and both follow as ATen",
        (_scored_in_fp32, _softmax, _before_selection, _groups, _gating_limits, _gating_devices, _bias_on_scores),
    ),
    Row(
        "softmax over the selected",
        "npu_moe_gating_top_k_softmax_v2(renorm=1)",
        "top-k of the raw logits, then softmax over the k: fp32 inside the op rounds later than the model and reorders nothing",
        (_softmax, _after_selection, _no_bias, _no_groups, _softmax_limits, _second_softmax_devices),
    ),
    Row(
        "any score, by the logits",
        "npu_moe_gating_top_k_softmax_v2(renorm=1) + gather",
        "top-k of the raw logits: only the op's ids are used; scores are ATen in the recovered dtype, gathered at the ids",
        (_by_logits, _no_bias, _no_groups, _softmax_limits, _second_softmax_devices),
    ),
    Row("anything else", "aten", "as recovered: top-k, gather and pointwise ops in the recovered dtype", ()),
)


def choose_routing(c: Case) -> tuple[Row, list[tuple[Row, str]]]:
    """The row that is taken, and what every row above it objected to."""
    refused: list[tuple[Row, str]] = []
    for row in ROUTING:
        why = row.refuses(c)
        if why is None:
            return row, refused
        refused.append((row, why))
    raise AssertionError("the last row takes everything")


def why_aten(c: Case) -> str | None:
    """Why a routing stays in ATen: what the last row made for its score objected to, else the last row; None where an op takes it."""
    row, refused = choose_routing(c)
    if row is not ROUTING[-1]:
        return None
    *own, last = [why for row, why in refused if row.is_of(c)]
    return own[-1] if own else last


# ---- activations -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clipped:
    """g' = min(g, limit), u' = clamp(u, ±limit): g' σ(alpha g') (u' + bias)."""

    alpha: float
    limit: float
    bias: float


def swiglu(expr: sp.Expr, form: int) -> bool:
    """Whether npu_swiglu is the activation: silu of the first half times the second."""
    return form == Form.CONCAT and expr == act.SWIGLU


def clipped(expr: sp.Expr, form: int) -> Clipped | None:
    """The numbers of npu_clipped_swiglu, when it is the activation."""
    if form not in (Form.CONCAT, Form.INTERLEAVED):
        return None
    limits = {float(a) for c in expr.atoms(act.clamp) for a in c.args[1:] if abs(float(a)) != math.inf and float(a) > 0}
    if len(limits) != 1:
        return None
    gate = next((c for c in expr.atoms(act.clamp) if c.args[0] == act.G), None)
    up = next((c for c in expr.atoms(act.clamp) if c.args[0] == act.U), None)
    if gate is None or up is None or float(gate.args[1]) != -math.inf or float(up.args[1]) != -float(up.args[2]):
        return None
    a, b = sp.Symbol("a"), sp.Symbol("b")
    plain = expr.subs({gate: a, up: b})
    slopes = [s.args[0].coeff(a) for s in plain.atoms(act.sigmoid)]
    if len(slopes) != 1 or not slopes[0].is_number:
        return None
    rest = sp.simplify(plain / (a * act.sigmoid(slopes[0] * a)))
    offset = sp.simplify(rest - b)
    return Clipped(float(slopes[0]), limits.pop(), float(offset)) if offset.is_number else None


def activation_call(expr: sp.Expr, form: int) -> str:
    """What computes the activation, for the report."""
    if swiglu(expr, form):
        return "npu_swiglu"
    return "npu_clipped_swiglu" if clipped(expr, form) else "pointwise"
