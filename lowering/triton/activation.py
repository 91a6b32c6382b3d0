"""An activation program as Triton functions: act(g, u) -> a and dual(g, u) -> (a, da/dg, da/du), all in fp32.

The code is generated from the op's postfix program (`moe_compile.activation.encode`), so that a new activation needs no kernel of its own.
Kernels take the functions as constexpr arguments. For one projection without a gate u is ignored and da/du is zero.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...ir import scalar as act

# In the order of the opcodes (scalar.FUNCTIONS): value from v, slope from v and the value s
_UNARY: list[tuple[str, str]] = [
    ("tl.sigmoid({v})", "{s} * (1.0 - {s})"),
    ("2.0 * tl.sigmoid(2.0 * {v}) - 1.0", "1.0 - {s} * {s}"),
    ("tl.exp({v})", "{s}"),
    ("tl.log({v})", "1.0 / {v}"),
    ("tl.erf({v})", "1.1283791670955126 * tl.exp(-{v} * {v})"),
    ("tl.where({v} < 0.0, 0.0, {v})", "tl.where({v} > 0.0, 1.0, 0.0)"),
    ("tl.where({v} > 0.0, {v}, 0.0) + {log1p}", "tl.sigmoid({v})"),
    ("{v} * tl.sigmoid(1.5957691216057308 * ({v} + 0.044715 * {v} * {v} * {v}))", ""),
    ("tl.abs({v})", "tl.where({v} > 0.0, 1.0, tl.where({v} < 0.0, -1.0, 0.0))"),
    ("{log1p}", "1.0 / (1.0 + {v})"),
    ("{expm1}", "{s} + 1.0"),
    ("tl.exp2({v})", "0.6931471805599453 * {s}"),
]
_SOFTPLUS, _GELU_TANH, _LOG1P, _EXPM1 = 6, 7, 9, 10


@dataclass(frozen=True)
class Functions:
    """The jitted pair; `key` names the program in caches."""

    act: Any
    dual: Any
    key: str


@dataclass(frozen=True)
class _Dual:
    """Names of a value and its slopes; None is zero."""

    v: str
    dg: str | None
    du: str | None


class _Writer:
    """Statements of one function body, each assigned to a fresh name."""

    def __init__(self, slopes: bool) -> None:
        self.lines: list[str] = []
        self.slopes = slopes

    def let(self, code: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {code}")
        return name

    def times(self, slope: str | None, factor: str) -> str | None:
        return None if slope is None else factor if slope == "1.0" else self.let(f"{slope} * {factor}")

    def plus(self, a: str | None, b: str | None) -> str | None:
        return b if a is None else a if b is None else self.let(f"{a} + {b}")

    def chain(self, x: _Dual, value: str, slope: str) -> _Dual:
        """f(x) with slope f'(x)."""
        if not self.slopes or (x.dg is None and x.du is None):
            return _Dual(value, None, None)
        s = self.let(slope)
        return _Dual(value, self.times(x.dg, s), self.times(x.du, s))


def functions(ops: Sequence[int], consts: Sequence[float]) -> Functions:
    """The jitted act and dual of a program. Needs triton."""
    return _functions(tuple(ops), tuple(consts))


def source(ops: Sequence[int], consts: Sequence[float]) -> str:
    """Python source of the two functions, undecorated."""
    out = []
    for name, slopes in (("act", False), ("dual", True)):
        w = _Writer(slopes)
        result = _emit(ops, consts, w)
        body = [*w.lines, f"return {', '.join(_returned(result)) if slopes else result.v}"]
        out += [f"def {name}(g, u):", *(f"    {line}" for line in body), "", ""]
    return "\n".join(out)


def _returned(d: _Dual) -> Iterator[str]:
    """Slopes that do not depend on g must still have its shape."""
    yield d.v
    for slope in (d.dg, d.du):
        yield "tl.zeros_like(g)" if slope is None else "tl.zeros_like(g) + 1.0" if slope == "1.0" else slope


def _emit(ops: Sequence[int], consts: Sequence[float], w: _Writer) -> _Dual:
    const = iter(consts)
    stack: list[_Dual] = []
    for op in ops:
        if op == act.OP_G:
            stack.append(_Dual("g", "1.0", None))
        elif op == act.OP_U:
            stack.append(_Dual("u", None, "1.0"))
        elif op == act.OP_CONST:
            stack.append(_Dual(_number(next(const)), None, None))
        elif op in act.OF_TWO:
            b, a = stack.pop(), stack.pop()
            stack.append((_sum, _product, _quotient)[act.OF_TWO.index(op)](w, a, b))
        elif op == act.OP_POW:
            stack.append(_power(w, stack.pop(), next(const)))
        elif op == act.OP_CLAMP:
            stack.append(_clamp(w, stack.pop(), next(const), next(const)))
        else:
            stack.append(_unary(w, stack.pop(), op - act.OP_UNARY))
    last = stack[-1]
    # a program without g (or a bare constant) still has g's shape
    return last if last.v in ("g", "u") or any(o in (act.OP_G, act.OP_U) for o in ops) else _Dual(w.let(f"g * 0.0 + {last.v}"), None, None)


def _sum(w: _Writer, a: _Dual, b: _Dual) -> _Dual:
    v = w.let(f"{a.v} + {b.v}")
    return _Dual(v, w.plus(a.dg, b.dg), w.plus(a.du, b.du)) if w.slopes else _Dual(v, None, None)


def _product(w: _Writer, a: _Dual, b: _Dual) -> _Dual:
    v = w.let(f"{a.v} * {b.v}")
    if not w.slopes:
        return _Dual(v, None, None)
    return _Dual(v, w.plus(w.times(a.dg, b.v), w.times(b.dg, a.v)), w.plus(w.times(a.du, b.v), w.times(b.du, a.v)))


def _quotient(w: _Writer, a: _Dual, b: _Dual) -> _Dual:
    """v = a / b with slope (a' - v b') / b: no square of b, which may be 0."""
    v = w.let(f"{a.v} / {b.v}")
    if not w.slopes:
        return _Dual(v, None, None)

    def slope(x: str | None, y: str | None) -> str | None:
        top = w.plus(x, None if y is None else w.let(f"-{v} * {y}"))
        return None if top is None else w.let(f"{top} / {b.v}")

    return _Dual(v, slope(a.dg, b.dg), slope(a.du, b.du))


def _power(w: _Writer, x: _Dual, p: float) -> _Dual:
    v = w.let(_raised(x.v, p))
    return w.chain(x, v, f"{_number(p)} * ({_raised(x.v, p - 1)})")


def _raised(v: str, p: float) -> str:
    """v ** p as code; whole powers by multiplication, which also takes negative v."""
    if p == int(p) and 0 <= abs(p) <= 8:
        whole = " * ".join([v] * int(abs(p))) or f"({v} * 0.0 + 1.0)"
        return whole if p >= 0 else f"1.0 / ({whole})"
    if p == 0.5:
        return f"tl.sqrt({v})"
    if p == -0.5:
        return f"1.0 / tl.sqrt({v})"
    return f"tl.exp({_number(p)} * tl.log({v}))"


def _clamp(w: _Writer, x: _Dual, lo: float, hi: float) -> _Dual:
    """Limits by comparison: a NaN passes, as in torch."""
    inside, v, at = [], x.v, "=" if act.LIMITS_PASS else ""
    if lo != -float("inf"):
        v = f"tl.where({x.v} < {_number(lo)}, {_number(lo)}, {v})"
        inside.append(f"({x.v} >{at} {_number(lo)})")
    if hi != float("inf"):
        v = f"tl.where({x.v} > {_number(hi)}, {_number(hi)}, {v})"
        inside.append(f"({x.v} <{at} {_number(hi)})")
    return w.chain(x, w.let(v), f"tl.where({' & '.join(inside)}, 1.0, 0.0)") if inside else x


def _unary(w: _Writer, x: _Dual, which: int) -> _Dual:
    value, slope = _UNARY[which]
    log1p = _log1p(w, f"tl.exp(-tl.abs({x.v}))") if which == _SOFTPLUS else _log1p_of_any(w, x.v) if which == _LOG1P else ""
    s = w.let(value.format(v=x.v, log1p=log1p, expm1=_expm1(w, x.v) if which == _EXPM1 else ""))
    if which == _GELU_TANH:
        if not w.slopes:
            return _Dual(s, None, None)
        # x σ(z): σ + x σ (1 - σ) z', with z = 1.5957… (x + 0.044715 x³)
        gate = w.let(f"tl.sigmoid(1.5957691216057308 * ({x.v} + 0.044715 * {x.v} * {x.v} * {x.v}))")
        slope = f"{gate} + {x.v} * {gate} * (1.0 - {gate}) * 1.5957691216057308 * (1.0 + 0.134145 * {x.v} * {x.v})"
        return w.chain(x, s, slope)
    return w.chain(x, s, slope.format(v=x.v, s=s))


def _log1p(w: _Writer, t: str) -> str:
    """log(1 + t), t in [0, 1], exact to rounding where 1 + t is 1 or nearly so: t log(q) / (q - 1) with q = 1 + t rounded."""
    t = w.let(t)
    q = w.let(f"1.0 + {t}")
    return w.let(f"tl.where({q} == 1.0, {t}, tl.log({q}) * ({t} / tl.where({q} == 1.0, 1.0, {q} - 1.0)))")


def _log1p_of_any(w: _Writer, x: str) -> str:
    """log(1 + x): 2 atanh(x / (2 + x)) near zero, where 1 + x loses the digits of x."""
    z = w.let(f"{x} / (2.0 + {x})")
    q = w.let(f"{z} * {z}")
    small = w.let(f"2.0 * {z} * ({_horner(q, [1 / n for n in range(1, 15, 2)])})")
    return w.let(f"tl.where(({x} > -0.5) & ({x} < 0.5), {small}, tl.log(1.0 + {x}))")


def _expm1(w: _Writer, x: str) -> str:
    """exp(x) - 1: Taylor near zero."""
    small = w.let(f"{x} * ({_horner(x, [1 / math.factorial(n) for n in range(1, 10)])})")
    return w.let(f"tl.where(({x} > -0.5) & ({x} < 0.5), {small}, tl.exp({x}) - 1.0)")


def _horner(x: str, coefficients: list[float]) -> str:
    """c0 + x (c1 + x (...)) as code."""
    *first, last = map(repr, coefficients)
    return "".join(f"{c} + {x} * (" for c in first) + last + ")" * len(first)


def _number(c: float) -> str:
    return repr(float(c)) if abs(c) != float("inf") else f'{"-" if c < 0 else ""}float("inf")'


@functools.lru_cache(maxsize=256)
def _functions(ops: tuple[int, ...], consts: tuple[float, ...]) -> Functions:
    import triton
    import triton.language as tl

    text = source(ops, consts)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    act_, dual = (triton.jit(f) for f in _define(text, key, {"tl": tl}))
    return Functions(act_, dual, key)


def gluon_act(ops: Sequence[int], consts: Sequence[float]) -> Any:
    """The activation for Gluon kernels, which know no `tl.sigmoid`."""
    return _gluon_functions(tuple(ops), tuple(consts)).act


def gluon_dual(ops: Sequence[int], consts: Sequence[float]) -> Any:
    """The activation and its slopes for Gluon kernels."""
    return _gluon_functions(tuple(ops), tuple(consts)).dual


# Four instructions, where the language's exp and division spend ten more on ranges that cannot come up here. Relative error 2^-20 down to
# x = -20 and 2^-18 down to -87; results are rounded to 16 bits.
_SIGMOID = """def sigmoid(x):
    code: tl.constexpr = "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }"
    return tl.inline_asm_elementwise(code, "=f,f", [x * -1.4426950408889634], tl.float32, True, 1)
"""


@functools.lru_cache(maxsize=256)
def _gluon_functions(ops: tuple[int, ...], consts: tuple[float, ...]) -> Functions:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl

    text = source(ops, consts).replace("tl.sigmoid(", "sigmoid(")
    (sigmoid,) = _define(_SIGMOID, "sigmoid", {"tl": gl})
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    act_, dual = (gluon.jit(f) for f in _define(text, key, {"tl": gl, "sigmoid": gluon.jit(sigmoid)}))
    return Functions(act_, dual, key)


def _define(text: str, key: str, space: dict[str, Any]) -> list[Any]:
    """The functions of generated source. Triton reads a function's source through linecache; an entry without a time stamp stays."""
    name = f"<moe_compile activation {key}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space["__name__"] = f"moe_compile_activation_{key}"
    before = set(space)
    exec(compile(text, name, "exec"), space)
    return [v for k, v in space.items() if k not in before and k != "__builtins__"]
