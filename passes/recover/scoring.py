"""Score, selection bias, normaliser and scale, read off the criterion and the weights of a router as sympy expressions."""

from __future__ import annotations

import math
from typing import Any

import sympy as sp
import torch.fx as fx

from ...ir import BiasOn, Groups, MaxK, MinK, Norm, Normaliser, Score, SumK, W
from ...ir import scalar as act
from ...ir.score import SCORES
from .algebra import PER_EXPERT, L, Reductions, S, Translator, Unknown, canonical_function, loses_digits, show_expr, stable


def in_scores(kind: Score, expr: sp.Expr, red: Reductions) -> sp.Expr:
    """An expression in the logit as one in the score."""
    f, power = SCORES[kind]
    of_logit = canonical_function(f.name, L)
    return red.replace(expr, lambda x: x.subs(of_logit, S**power))


def build(
    select: sp.Expr, value: sp.Expr, tr: Translator, groups: Groups | None, bias: fx.Node | None, table: fx.Node | None
) -> dict[str, Any]:
    """The fields of `Gating` that the two expressions determine; raises `Unknown` with the reason. Equal routers are read once."""
    b, c = (None if n is None else tr.tables[n] for n in (bias, table))
    key = (select, value, groups, b, c, *tr.reductions.size.items(), *tr.reductions.by_symbol.items())
    if key not in _read:
        if len(_read) > 1024:
            _read.clear()
        _read[key] = _build(select, value, tr.reductions, groups, b, c)
    return _read[key]


_read: dict[Any, dict[str, Any]] = {}


def _build(
    select: sp.Expr, value: sp.Expr, red: Reductions, groups: Groups | None, b: sp.Symbol | None, c: sp.Symbol | None
) -> dict[str, Any]:
    if c is not None:
        value = sp.cancel(value / c)
        if c in value.free_symbols:
            raise Unknown("a per-expert table enters the weights other than as a factor")
    whole = b is not None or groups is not None
    kind, over_selected, out, select = _scored(select, value, red, whole)
    bias_on, in_weights = BiasOn.NONE, False
    if b is not None:
        bias_on = _bias_on(select, b, kind)
        out, in_weights = _without_bias(out, b, red)
    else:
        _check_monotone(select, groups, kind)
    norm, scale = normaliser(out, red)
    if kind is Score.SOFTMAX and not over_selected and norm is not None and not whole:
        if norm.kind is Norm.SUM and 0 < norm.clamp_min < red.size["K"] / red.size["E"]:
            norm = Normaliser(Norm.SUM, eps=norm.eps)  # k softmax values never sum to less than k/E
            if norm.eps == 0:
                over_selected, norm = True, None
    return dict(
        score=kind, score_over_selected=over_selected, bias=bias_on, bias_in_weights=in_weights, norm=norm, scale=scale,
    )  # fmt: skip


def _scored(select: sp.Expr, value: sp.Expr, red: Reductions, whole: bool) -> tuple[Score, bool, sp.Expr, sp.Expr]:
    """The score, whether it runs over the selected experts only, the weights and the criterion as expressions in it.

    whole: a selection bias or groups are there, which read the scores of all experts.
    """
    softmax_all = _softmax_all(red)
    if whole and softmax_all is not None and softmax_all in select.free_symbols:
        return Score.SOFTMAX, False, _with_softmax(value, red, softmax_all), _with_softmax(select, red, softmax_all)
    kind, over_selected, out = _score(value, red, softmax_all)
    if kind is Score.SOFTMAX and not over_selected and softmax_all is not None:
        select = _with_softmax(select, red, softmax_all)
    elif kind not in (Score.IDENTITY, Score.SOFTMAX):
        select = in_scores(kind, select, red)
    return kind, over_selected, out, select


def _without_bias(out: sp.Expr, b: sp.Symbol, red: Reductions) -> tuple[sp.Expr, bool]:
    """The weights as a function of s + b alone, where the bias enters them; and whether it does."""
    if b not in out.free_symbols and not any(b in r.body.free_symbols for r in red.by_symbol.values()):
        return out, False
    q = red.replace(out, lambda x: x.subs(S, S - b))
    if b in _all_symbols(q, red):
        raise Unknown("the selection bias enters the weights")
    return q, True


def _all_symbols(e: sp.Expr, red: Reductions) -> set[sp.Symbol]:
    out = set(e.free_symbols)
    for z in list(out & set(red.by_symbol)):
        out |= _all_symbols(red.by_symbol[z].body, red)
    return out


def _softmax_all(red: Reductions) -> sp.Symbol | None:
    return next((z for z, r in red.by_symbol.items() if (r.kind, r.over, r.body) == ("sum", "E", sp.exp(L))), None)


def _with_softmax(expr: sp.Expr, red: Reductions, z: sp.Symbol) -> sp.Expr:
    """Write exp(l) as s Z: s is the softmax over all experts."""
    out = red.replace(expr, lambda x: sp.expand_power_base(x.subs(sp.exp(L), S * z)), (z,))
    return sp.cancel(sp.together(out)) if z in out.free_symbols else out


def _score(value: sp.Expr, red: Reductions, softmax_all: sp.Symbol | None) -> tuple[Score, bool, sp.Expr]:
    """(score, whether it runs over the selected experts only, the weights as an expression in s)."""
    selected = next((z for z, r in red.by_symbol.items() if (r.kind, r.over, r.body) == ("sum", "K", sp.exp(L))), None)
    if selected is not None and selected in value.free_symbols and (softmax_all is None or softmax_all not in value.free_symbols):
        out = (
            red.replace(value, lambda x: x.subs(sp.exp(L), S * selected), (selected,))
            if not (value * selected / sp.exp(L)).is_number
            else value * selected / sp.exp(L) * S
        )
        if not _mentions(out, red, L, selected):
            return Score.SOFTMAX, True, out
    if softmax_all is not None and softmax_all in _all_symbols(value, red):
        out = _with_softmax(value, red, softmax_all)
        if not _mentions(out, red, L, softmax_all):
            return Score.SOFTMAX, False, out
        raise Unknown(f"softmax scores enter the weights in an unknown way: {show_expr(value, red)[:120]}")
    found = [(kind, out) for kind in SCORES if (out := in_scores(kind, value, red)) != value and not _mentions(out, red, L)]
    found = [(kind, out) for kind, out in found if kind not in (Score.SIGMOID, Score.TANH) or not _loses_digits(out, red)]
    if found:
        kind, out = found[0] if len(found) == 1 else min(found, key=lambda x: _complexity(x[1], red))
        if kind is Score.EXP and _scale_free(out, red):
            return Score.SOFTMAX, False, out  # the softmax's own sum cancels; keep it, for exp alone overflows
        return kind, False, out
    out = red.replace(value, lambda x: x.subs(L, S))
    return Score.IDENTITY, False, out


def _complexity(out: sp.Expr, red: Reductions) -> tuple[bool, int]:
    """Weights that are a known normaliser of the scores come first, then the shorter expression."""
    try:
        norm, _ = normaliser(out, red)
    except Unknown:
        return True, 1 << 20
    return norm is not None and norm.kind is Norm.EXPR, out.count_ops()


def _loses_digits(out: sp.Expr, red: Reductions) -> bool:
    bodies = [red.by_symbol[z].body for z in _all_symbols(out, red) & set(red.by_symbol)]
    return any(loses_digits(e, S) for e in (out, *bodies))


def _scale_free(out: sp.Expr, red: Reductions) -> bool:
    """Whether the weights stay the same when every score is multiplied by one positive number."""
    a = sp.Symbol("a", positive=True)
    return bool(sp.simplify(red.replace(out, lambda x: x.subs(S, S * a)) - out) == 0)


def _mentions(e: sp.Expr, red: Reductions, *symbols: sp.Symbol) -> bool:
    return bool(_all_symbols(e, red) & set(symbols))


def _bias_on(select: sp.Expr, b: sp.Symbol, kind: Score) -> BiasOn:
    rest = sp.expand(select - b)
    if rest == S or (rest == L and kind is Score.IDENTITY):
        return BiasOn.SCORE
    stripped = strip_monotone(select)
    if sp.expand(stripped - b) == L:
        return BiasOn.LOGIT
    raise Unknown(f"the selection is not score plus bias: {select}")


def _check_monotone(select: sp.Expr, groups: Groups | None, kind: Score) -> None:
    stripped = strip_monotone(select)
    if stripped not in (L, S):
        raise Unknown(f"the selection is no increasing function of the logit: {select}")
    if groups is not None and (groups.top > 1 or groups.fill != -math.inf) and select not in (S, L):
        raise Unknown("groups are scored by another function than the weights")
    if groups is not None and select == L and kind is not Score.IDENTITY and (groups.top > 1 or groups.fill != -math.inf):
        raise Unknown("groups are scored by logits, the weights by scores")


def strip_monotone(e: sp.Expr) -> sp.Expr:
    """Peel off what keeps the order of the experts of one token: positive factors, shifts, increasing functions."""
    while True:
        if e.is_Mul:
            outside, inside = e.as_independent(*_expert_symbols(e), as_Add=False)
            if outside != 1 and outside.is_positive:
                e = inside
                continue
        if e.is_Add:
            outside, inside = e.as_independent(*_expert_symbols(e), as_Add=True)
            if outside != 0:
                e = inside
                continue
        if isinstance(e, act.INCREASING):
            e = e.args[0]
            continue
        if e.is_Pow and e.exp.is_positive and e.base.is_positive:
            e = e.base
            continue
        if e.is_Pow and e.exp == sp.Rational(1, 2):
            e = e.base
            continue
        return e


def _expert_symbols(e: sp.Expr) -> tuple[sp.Symbol, ...]:
    return tuple(s for s in e.free_symbols if s in PER_EXPERT or str(s).startswith("table")) or PER_EXPERT


def normaliser(value: sp.Expr, red: Reductions) -> tuple[Normaliser | None, float]:
    """value = scale · s / guard(reduction(s)) -> (normaliser, scale)."""
    ratio = sp.cancel(value / S) if value.is_rational_function(S) else sp.simplify(value / S)
    if ratio.is_number:
        if not ratio.is_real:
            raise Unknown(f"the weights are {ratio} times the scores")
        return None, float(ratio)
    below = 1 / ratio
    zs = ratio.free_symbols & set(red.by_symbol)
    if not (ratio.free_symbols & set(PER_EXPERT)) and len(zs) == 1:
        (z,) = zs
        kind = _norm_kind(red.by_symbol[z])
        if kind is not None:
            found = _guarded(below, z, *kind) or _guarded(sp.simplify(below), z, *kind)  # what makes it simple takes long to import
            if found is not None:
                return found
    return Normaliser(Norm.EXPR, expr=_as_ir(value, red)), 1.0


def _norm_kind(r: Any) -> tuple[Norm, float] | None:
    if r.over != "K":
        return None
    if r.body == S:
        return {"sum": (Norm.SUM, 1.0), "max": (Norm.MAX, 1.0)}.get(r.kind)
    if r.kind == "sum" and r.body.is_Pow and r.body.base == S and r.body.exp.is_number:
        return Norm.PNORM, float(r.body.exp)
    return None


def _guarded(below: sp.Expr, z: sp.Symbol, kind: Norm, p: float) -> tuple[Normaliser, float] | None:
    """1/ratio = (d + eps) / scale, or clamp(d, m) / scale, with d the reduction."""
    d = z ** sp.nsimplify(1 / p, rational=True) if kind is Norm.PNORM else z
    clamps = list(below.atoms(act.clamp))
    if len(clamps) == 1:
        inner, lo, hi = clamps[0].args
        if inner == d and hi == sp.oo and lo.is_positive:
            k = below / clamps[0]
            if k.is_number:
                return Normaliser(kind, clamp_min=float(lo), p=p), float(1 / k)
        return None
    slope = sp.cancel(sp.diff(below, z) / sp.diff(d, z))
    if not slope.is_number:
        return None
    rest = sp.cancel(below - slope * d)
    rest = rest if rest.is_number else sp.cancel(sp.simplify(below - slope * d))
    if not rest.is_number:
        return None
    return Normaliser(kind, eps=float(rest / slope), p=p), float(1 / slope)


def _as_ir(value: sp.Expr, red: Reductions) -> sp.Expr:
    """An unknown normaliser in the IR's own symbols: w, SumK, MaxK, MinK."""
    heads = {"sum": SumK, "max": MaxK, "min": MinK}

    def go(e: sp.Expr) -> sp.Expr:
        out = e
        for z in sorted(e.free_symbols & set(red.by_symbol), key=str):
            r = red.by_symbol[z]
            if r.over != "K":
                raise Unknown("the weights depend on the scores of all experts")
            out = out.subs(z, heads[r.kind](go(r.body)))
        return out

    out = stable(go(value).subs(S, W))
    if out.free_symbols - {W}:
        raise Unknown(f"the weights are no function of the selected scores: {value}")
    return out
