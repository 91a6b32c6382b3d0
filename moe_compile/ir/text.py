"""The IR as text: readable maths for the report."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import sympy as sp
import torch

from . import BiasOn, Exchange, Experts, Form, Gating, Groups, Norm, Normaliser, Score, SharedExpert, W, Way
from .chain import Chain, Stage, product, vector
from .rows import Rows
from .scalar import FUNCTIONS, SWIGLU, G, U, gelu, gelu_tanh, relu, sigmoid, silu
from .score import score_text
from .stored import ALL, Scale, Stored, Zero

_DTYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def dtype_text(dtype: torch.dtype) -> str:
    """bf16, fp32, ... or torch's own name."""
    return _DTYPE.get(dtype, str(dtype).removeprefix("torch."))


def formula(gating: Gating) -> str:
    """The routing weights as a formula, such as ``w = 2.826 · σ(l)[top8 of σ(l)+b] / (Σ + 1e-20)``.

    l: router logits, b: selection bias, c: per-expert scale, Σ: sum over the k selected. Every field of the IR shows.
    """
    w = _weights(gating)
    if gating.norm is not None and gating.norm.kind is not Norm.NONE:
        w = _normalised(gating.norm, w)
    if gating.scale != 1.0:
        w = f"{number(gating.scale)} · {w}"
    if gating.expert_scale:
        w = f"{w} · c[id]"
    return f"w = {w}{_dtypes(gating)}"


def _score(kind: Score, argument: str) -> str:
    name = score_text(kind)
    return f"{name}({argument})" if name else argument


def _weights(g: Gating) -> str:
    """The score of the selected experts, before normalising and scaling."""
    everywhere = _score(g.score, "l")
    gathered = "l" if g.score_over_selected else everywhere
    if g.bias_in_weights and not g.score_over_selected:
        gathered += "+b"
    choice = "l" if g.score_over_selected or g.bias is BiasOn.LOGIT else everywhere
    if g.bias is not BiasOn.NONE:
        choice += "+b"
    of = "" if choice == gathered else f" of {choice}"
    pick = f"[top{g.k}{of}{_groups(g.groups)}]"
    if not g.score_over_selected:
        return (f"({gathered})" if gathered.endswith("+b") else gathered) + pick
    scored = _score(g.score, "l" + pick)
    return f"({scored} + b[id])" if g.bias_in_weights else scored


def _groups(g: Groups | None) -> str:
    if g is None:
        return ""
    by = "max" if g.top == 1 else f"Σ top{g.top}"
    fill = "" if g.fill == float("-inf") else f", others {number(g.fill)}"
    return f" in best {g.kept} of {g.count} groups by {by}{fill}"


def _normalised(norm: Normaliser, w: str) -> str:
    if norm.kind is Norm.EXPR:
        return f"{_expression(norm.expr)}, w' = {w}"
    d = {Norm.SUM: "Σ", Norm.MAX: "max", Norm.PNORM: f"‖·‖{_subscript(norm.p)}"}[norm.kind]
    if norm.clamp_min:
        d = f"max({d}, {number(norm.clamp_min)})"
    return f"{w} / ({d} + {number(norm.eps)})" if norm.eps else f"{w} / {d}"


def _expression(expr: Any) -> str:
    text = str(_decimals(expr.subs(W, sp.Symbol("w'"))))
    for a, b in (("SumK(", "Σ("), ("MaxK(", "max("), ("MinK(", "min("), ("**", "^"), ("*", "·")):
        text = text.replace(a, b)
    return text


def _subscript(p: float) -> str:
    text = "∞" if p == float("inf") else number(p)
    return text.translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def _dtypes(g: Gating) -> str:
    notes = []
    if g.score_dtype != torch.float32:
        notes.append(f"scored in {dtype_text(g.score_dtype)}")
    if g.weight_dtype != g.score_dtype:
        notes.append(f"w in {dtype_text(g.weight_dtype)}")
    return f" ({', '.join(notes)})" if notes else ""


def number(x: float) -> str:
    """A float as a person writes it: 2.826, 1e-20, −∞, 1."""
    if x in (float("inf"), float("-inf")):
        return "∞" if x > 0 else "−∞"
    return f"{x:.6g}"


def describe(expr: sp.Expr) -> str:
    """A reader's name for an activation: SwiGLU, GeGLU, ReLU², or the expression itself."""
    named: dict[Any, str] = {
        SWIGLU: "SwiGLU",
        silu(U) * G: "SwiGLU (up first)",
        gelu_tanh(G) * U: "GeGLU (tanh)",
        relu(G) * U: "ReGLU",
        sigmoid(G) * U: "GLU",
        silu(G): "SiLU",
        gelu_tanh(G): "GELU (tanh)",
        relu(G): "ReLU",
        relu(G) ** 2: "ReLU²",
    }
    if expr.has(sp.erf):  # sympy's first sum of a process takes a tenth of a second
        named |= {gelu(G) * U: "GeGLU", gelu(G): "GELU"}
    return named.get(expr) or re.sub(r"(\.\d*?[1-9])0+\b", r"\1", str(_decimals(expr)).replace("**", "^"))


def _decimals(expr: Any) -> Any:
    return expr.replace(lambda e: e.is_Rational and not e.is_Integer, lambda e: sp.Float(str(float(e))))


def activation_text(expr: object) -> str:
    """SwiGLU, ReLU², or the expression with σ and ∞ for sigmoid and oo."""
    text = describe(expr)
    if "(" not in text or text.endswith(("(tanh)", "(up first)")):
        return text
    return _signs(text)


def _signs(text: str) -> str:
    """σ, ∞ and · for sigmoid, oo and *."""
    written = [(f"{f.head.__name__}(", f"{f.text}(") for f in FUNCTIONS if f.text]
    for a, b in (*written, ("-oo", "−∞"), ("oo", "∞"), ("*", "·")):
        text = text.replace(a, b)
    return text


def experts_text(e: Experts) -> str:
    """One line on the experts, such as ``128 × SwiGLU 2048→1024→2048, stacked [E,out,in]``."""
    if e.chain is not None:
        parts = [f"{e.num_experts} × {chain_text(e.chain, e.hidden)}", "stacked" if e.stacked else "list of matrices"]
        return ", ".join([*parts, *_beside(e)])
    parts = [f"{e.num_experts} × {activation_text(e.activation)} {e.hidden}→{e.intermediate}→{e.out_features}", _layout(e)]
    if e.form is Form.INTERLEAVED:
        parts.append("gate/up interleaved")
    elif e.form is Form.SEPARATE:
        parts.append("gate and up apart")
    if e.up_bias or e.down_bias:
        parts.append("biases" if e.up_bias and e.down_bias else "up bias" if e.up_bias else "down bias")
    if e.coded:
        both = {"up": e.up_stored, "down": e.down_stored}
        parts += [stored_text(e.up_stored)] if e.up_stored == e.down_stored else [f"{stored_text(s)} ({n})" for n, s in both.items() if s]
    if e.adapted:
        at = (("up", e.up_pair or e.second_pair), ("down", e.down_pair))
        parts.append(f"low-rank pairs ({', '.join(name for name, s in at if s)})")
    if e.rounded:
        told = {"up": e.up_rows, "down": e.down_rows}
        parts += [rows_text(e.up_rows)] if e.up_rows == e.down_rows else [f"{rows_text(r)} ({n})" for n, r in told.items() if r]
    if e.weight_on_input:
        parts.append("w on input")
    return ", ".join([*parts, *_beside(e)])


def _beside(e: Experts) -> list[str]:
    """What is said of any experts."""
    told = {f"+ {e.num_identity} identity": e.num_identity, "ids mapped": e.ids_mapped, f"ids − {e.first}": e.first}
    told[dtype_text(e.dtype)] = e.dtype != torch.float32
    return [what for what, there in told.items() if there]


def chain_text(c: Chain, hidden: int) -> str:
    """Such as ``32→24→32: SwiGLU; y/√(mean(y^2) + 1e-05)``; y, z are a stage's products, p, q its vectors, x the expert's input."""
    widths = "→".join(map(str, [hidden, *(s.width for s in c.stages if s.matrices)]))
    return f"{widths}: {'; '.join(map(_stage_text, c.stages))}"


def _stage_text(s: Stage) -> str:
    for first, second in ((G, U), (U, G)):
        name = describe(s.map.subs({product(0): first, product(1): second}, simultaneous=True))
        if s.matrices and not s.vectors and name.removesuffix(" (tanh)").isalnum() and name not in ("g", "u"):
            return name
    letters = {product(i): sp.Symbol("yzuv"[i]) for i in range(min(len(s.matrices), 4))}
    letters |= {vector(i): sp.Symbol("pqrs"[i]) for i in range(min(len(s.vectors), 4))}
    expr = s.map.subs(letters, simultaneous=True)
    root = sp.Function("√")
    expr = expr.replace(lambda e: e.is_Pow and abs(e.exp) == sp.S.Half, lambda e: root(e.base) ** (1 if e.exp > 0 else -1))
    return _signs(describe(expr)).replace("^2", "²")


def stored_text(s: Stored | None) -> str:
    """How weights lie in memory, such as ``float8_e4m3fn × scale of 128 × 128``."""
    if s is None:
        return "floats"
    if s.zeroed == Zero.ADDED:
        return f"{stored_text(replace(s, zeroed=Zero.NONE))} + zero point"
    codes = f"{s.bits} bits in {dtype_text(s.dtype)}" if s.axis else dtype_text(s.dtype)
    codes = f"({codes} − zero point)" if s.zeroed else codes
    if not s.scaled:
        return codes
    if s.second:
        again = replace(s, rows=s.second_rows, columns=s.second_columns, scaled=Scale.TIMES, second=Scale.NONE)
        sign = "÷" if s.second == Scale.DIVIDES else "×"
        return f"{stored_text(replace(s, second=Scale.NONE))} {sign}{stored_text(again).rpartition(' ×')[2]}"
    if s.scaled == Scale.DIVIDES:
        return stored_text(replace(s, scaled=Scale.TIMES)).replace(" × ", " ÷ ", 1)
    if s.indexed:
        return f"{codes} × scale of {'rows' if s.indexed == 1 else 'columns'} by index"
    if s.columns == s.rows == ALL:
        return f"{codes} × scale of an expert"
    if not s.grid:
        several = max(s.rows, s.columns)
        return f"{codes} × scale" + (f" of {several} channels" if several > 1 else "")
    return f"{codes} × scale of {s.rows} × {s.columns}"


def rows_text(r: Rows | None) -> str:
    """How rows are rounded, such as ``rows in float8_e4m3fn by 128``."""
    if r is None:
        return "rows as they are"
    groups = f" by {r.group}" if r.group else " by a calibrated number" if r.static else ""
    return f"rows in {dtype_text(r.dtype)}{groups}{', powers of two' if r.power else ''}{', smoothed' if r.smooth else ''}"


def _layout(e: Experts) -> str:
    kind, lead = ("stacked", "E,") if e.stacked else ("list of", "")
    up, down = (f"[{lead}in,out]" if t else f"[{lead}out,in]" for t in (e.up_transposed, e.down_transposed))
    return f"{kind} {up}" if up == down else f"{kind} up {up} down {down}"


def shared_text(s: SharedExpert | None) -> str:
    """The shared expert, such as ``σ(x·g) · SwiGLU 1024``; ``–`` when there is none."""
    if s is None:
        return "–"
    text = f"{activation_text(s.activation)} {s.intermediate}" + (", biases" if s.bias else "")
    if s.coded:
        stored = dict.fromkeys(stored_text(how) for how in (s.up_stored, s.down_stored) if how is not None)
        rows = [rows_text(s.down_rows or s.up_rows)] if s.up_rows or s.down_rows else []
        text = ", ".join([text, f"weights {', '.join(stored)}", *rows])
    return f"σ(x·g) · {text}" if s.gated else text


_WAYS = {Way.SHARED: "shared rows, all-reduce", Way.GATHER: "all-gather, reduce-scatter", Way.ROWS: "rows by all-to-all"}


def exchange_text(e: Exchange | None) -> str:
    """One line, such as ``rank 0 of 4: all-gather, reduce-scatter``; empty where all experts are here."""
    return "" if e is None else f"rank {e.rank} of {e.size}: {_WAYS[e.way]}"
