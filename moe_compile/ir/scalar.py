"""Scalar functions in one table, expressions of them, and the programs that ops carry.

An activation is any pointwise function of the two up-projections of one expert, ``g`` (first) and ``u`` (second): data, not a class. A
routing score or a normaliser is an expression too. Everything that the compiler knows of a function stands in its row of `FUNCTIONS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor

G, U = sp.symbols("g u", real=True)


class relu(sp.Function):  # type: ignore[misc]
    nargs = 1


class sigmoid(sp.Function):  # type: ignore[misc]
    nargs = 1

    def _eval_is_positive(self) -> bool:
        return True


class softplus(sp.Function):  # type: ignore[misc]
    nargs = 1
    _eval_is_positive = sigmoid._eval_is_positive


class exp2(sp.Function):  # type: ignore[misc]
    nargs = 1
    _eval_is_positive = sigmoid._eval_is_positive


class gelu_tanh(sp.Function):  # type: ignore[misc]
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), Hendrycks and Gimpel 2016."""

    nargs = 1


class log1p(sp.Function):  # type: ignore[misc]
    """log(1 + x), exact to rounding for small x."""

    nargs = 1


class expm1(sp.Function):  # type: ignore[misc]
    """exp(x) - 1, exact to rounding for small x."""

    nargs = 1


class clamp(sp.Function):  # type: ignore[misc]
    """clamp(x, lo, hi); an absent limit is -oo or oo. Its slope at a limit is torch's own (`LIMITS_PASS`), relu's at 0 is 0."""

    nargs = 3


def silu(x: Any) -> Any:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def gelu(x: Any) -> Any:
    """x/2 * (1 + erf(x / sqrt 2))."""
    return x * (1 + sp.erf(x / sp.sqrt(2))) / 2


SWIGLU = silu(G) * U


def _limits_pass() -> bool:
    x = torch.zeros(1, device="cpu", requires_grad=True)
    with torch.enable_grad():
        return bool(torch.autograd.grad(x.clamp(min=0), x)[0])


LIMITS_PASS = _limits_pass()  # whether clamp's slope at a limit is 1, as it is before torch 2.14; 0 from there on


# ---- the table ---------------------------------------------------------------------------------------------------------


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@dataclass(frozen=True)
class Scalar:
    """One function of a real number.

    name: in terms, and of its ATen op. head: its sympy class. torch: on tensors. aten: further names of ATen ops that are this function of
    their one argument (`name` among them unless `plain` is False: the op has arguments that change it). increasing, positive: everywhere.
    text: as the report writes it.
    """

    name: str
    head: Any
    torch: Callable[[Tensor], Tensor]
    aten: tuple[str, ...] = ()
    plain: bool = True
    increasing: bool = False
    positive: bool = False
    text: str = ""

    def number(self, x: float) -> float:
        """The function of one number, as IEEE arithmetic has it: what overflows is infinite."""
        return float(self.torch(torch.tensor(x, dtype=torch.float64, device="cpu")))


# The position of a row is the function's opcode and part of the op's contract: rows are added at the end. Kernels have theirs in the same
# order (lowering/reference/generic.py, cpu/kernels/act.h, triton/activation.py, all in lowering/).
FUNCTIONS: tuple[Scalar, ...] = (
    Scalar("sigmoid", sigmoid, torch.sigmoid, ("special_expit", "expit"), increasing=True, positive=True, text="σ"),
    Scalar("tanh", sp.tanh, torch.tanh, increasing=True),
    Scalar("exp", sp.exp, torch.exp, increasing=True, positive=True),
    Scalar("log", sp.log, torch.log, increasing=True),
    Scalar("erf", sp.erf, torch.erf, ("special_erf",), increasing=True),
    Scalar("relu", relu, torch.relu),
    Scalar("softplus", softplus, F.softplus, plain=False, increasing=True, positive=True),
    Scalar("gelu_tanh", gelu_tanh, _gelu_tanh, plain=False),
    Scalar("abs", sp.Abs, torch.abs, ("absolute",)),
    Scalar("log1p", log1p, torch.log1p, ("special_log1p",), increasing=True),
    Scalar("expm1", expm1, torch.expm1, ("special_expm1",), increasing=True),
    Scalar("exp2", exp2, torch.exp2, ("special_exp2",), increasing=True, positive=True),
)
BY_NAME = {f.name: f for f in FUNCTIONS}
BY_HEAD = {f.head: f for f in FUNCTIONS}
HEADS = (*BY_HEAD, clamp)
INCREASING = tuple(f.head for f in FUNCTIONS if f.increasing)


def number(v: Any) -> sp.Expr:
    """A Python number as an exact one."""
    return sp.sympify(v) if isinstance(v, int) or abs(v) == float("inf") else sp.nsimplify(v, rational=True)


def call(name: str, x: sp.Expr, consts: tuple[Any, ...] = ()) -> sp.Expr:
    """A function by the name that terms have for it, of an expression. Raises KeyError for a name that has no row."""
    if name == "clamp":
        return clamp(x, *(number(c) for c in consts))
    if name == "erf":
        c, rest = _common_factor(x)
        return sp.erf(rest / sp.sqrt(2)) if abs(float(c) - 0.5**0.5) < 1e-9 else sp.erf(x)  # as gelu has it
    return BY_NAME[name].head(x)


def _common_factor(x: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    """c (a + b) of c a + c b."""
    parts = [a.as_coeff_Mul() for a in sp.Add.make_args(x)]
    same = len({c for c, _ in parts}) == 1
    return (parts[0][0], sp.Add(*(a for _, a in parts))) if same else (sp.S.One, x)


# ---- one walk over expressions, one over programs --------------------------------------------------------------------------


class UnknownActivation(ValueError):
    """The expression holds something that no opcode stands for."""


class Algebra(Protocol):
    """What an expression is made into: tensors, graph nodes, programs, expressions again."""

    def number(self, c: float) -> Any: ...
    def add(self, a: Any, b: Any) -> Any: ...
    def mul(self, a: Any, b: Any) -> Any: ...
    def div(self, a: Any, b: Any) -> Any: ...
    def power(self, a: Any, p: float) -> Any: ...
    def clamp(self, a: Any, lo: float, hi: float) -> Any: ...
    def apply(self, f: Scalar, a: Any) -> Any: ...


def fold(expr: Any, to: Algebra, known: Callable[[Any, Callable[[Any], Any]], Any]) -> Any:
    """An expression in another algebra. `known(e, go)`: what a symbol (or a function that has no row, by `go` of its arguments) is made
    into, None for all else. w · d ** -n is a division: its gradient stays finite where d * d is 0.

    Raises `UnknownActivation` naming the sub-expression that has no row.
    """

    def go(e: Any) -> Any:
        found = known(e, go)
        if found is not None:
            return found
        if e.is_number:
            return to.number(float(e))
        if isinstance(e, sp.Add):
            return functools.reduce(to.add, map(go, e.args))
        if isinstance(e, sp.Mul):
            below = [a for a in e.args if a.is_Pow and a.exp.is_number and a.exp.is_negative]
            top = functools.reduce(to.mul, map(go, [a for a in e.args if a not in below] or [sp.S.One]))
            return top if not below else to.div(top, functools.reduce(to.mul, [go(1 / a) for a in below]))
        if isinstance(e, sp.Pow) and e.exp.is_number:
            return to.div(to.number(1.0), go(1 / e)) if e.exp.is_negative else to.power(go(e.base), float(e.exp))
        if isinstance(e, clamp) and all(a.is_number for a in e.args[1:]):
            return to.clamp(go(e.args[0]), *(float(a) for a in e.args[1:]))
        row = BY_HEAD.get(e.func)
        if row is None:
            raise UnknownActivation(f"no opcode for {e}")
        return to.apply(row, go(e.args[0]))

    return go(sp.sympify(expr))


class Tensors:
    """Expressions as tensors, in their own dtype; differentiable."""

    number = float

    def add(self, a: Any, b: Any) -> Any:
        return a + b

    def mul(self, a: Any, b: Any) -> Any:
        return a * b

    def div(self, a: Any, b: Any) -> Any:
        return a / b

    def power(self, a: Any, p: float) -> Any:
        return a**p

    def clamp(self, a: Any, lo: float, hi: float) -> Any:
        return torch.clamp(a, lo, hi)

    def apply(self, f: Scalar, a: Any) -> Any:
        return f.torch(a)


class Expressions(Tensors):
    """Programs as expressions again."""

    number = staticmethod(number)  # type: ignore[assignment]

    def power(self, a: Any, p: float) -> Any:
        return a ** number(p)

    def clamp(self, a: Any, lo: float, hi: float) -> Any:
        return clamp(a, number(lo), number(hi))

    def apply(self, f: Scalar, a: Any) -> Any:
        return call(f.name, a)


OP_G, OP_U, OP_CONST, OP_ADD, OP_MUL, OP_POW, OP_CLAMP, OP_DIV = range(8)
OF_TWO = (OP_ADD, OP_MUL, OP_DIV)
OP_UNARY = 16  # opcodes 16.. are FUNCTIONS
_OPCODE = {f.name: OP_UNARY + i for i, f in enumerate(FUNCTIONS)}
_Code = tuple[list[int], list[float]]


class Programs:
    """Expressions as postfix programs: (opcodes, constants)."""

    def number(self, c: float) -> _Code:
        return [OP_CONST], [c]

    add, mul, div = (lambda self, a, b, op=op: ([*a[0], *b[0], op], [*a[1], *b[1]]) for op in OF_TWO)

    def power(self, a: _Code, p: float) -> _Code:
        return [*a[0], OP_POW], [*a[1], p]

    def clamp(self, a: _Code, lo: float, hi: float) -> _Code:
        return [*a[0], OP_CLAMP], [*a[1], lo, hi]

    def apply(self, f: Scalar, a: _Code) -> _Code:
        return [*a[0], _OPCODE[f.name]], a[1]


def encode(expr: sp.Expr) -> tuple[list[int], list[float]]:
    """Postfix program (opcodes, constants) of an activation expression in `G` and `U`.

    Raises `UnknownActivation` naming the sub-expression that has no opcode.
    """
    symbols: dict[Any, _Code] = {G: ([OP_G], []), U: ([OP_U], [])}
    ops, consts = fold(expr, Programs(), lambda e, _: symbols.get(e))
    return ops, consts


def interpret(
    ops: Iterable[int],
    consts: Iterable[float],
    values: Mapping[int, Any],
    to: Algebra,
    others: Mapping[int, Callable[[Any], Any]] = MappingProxyType({}),
) -> Any:
    """A postfix program in an algebra. `values`: what opcodes of symbols stand for; `others`: of further functions of one argument."""
    stack: list[Any] = []
    const = iter(consts)
    for op in ops:
        if op in values:
            stack.append(values[op])
        elif op == OP_CONST:
            stack.append(to.number(next(const)))
        elif op in OF_TWO:
            b, a = stack.pop(), stack.pop()
            stack.append((to.add, to.mul, to.div)[OF_TWO.index(op)](a, b))
        elif op == OP_POW:
            stack.append(to.power(stack.pop(), next(const)))
        elif op == OP_CLAMP:
            stack.append(to.clamp(stack.pop(), next(const), next(const)))
        elif op in others:
            stack.append(others[op](stack.pop()))
        else:
            stack.append(to.apply(FUNCTIONS[op - OP_UNARY], stack.pop()))
    return stack[-1]


def run(ops: Sequence[int], consts: Sequence[float], g: Tensor, u: Tensor | None = None) -> Tensor:
    """Evaluate a postfix program on tensors of one shape; differentiable, in the dtype of `g`."""
    out = interpret(ops, consts, {OP_G: g, OP_U: u}, Tensors())
    return torch.full_like(g, out) if isinstance(out, float) else out


def evaluate(expr: sp.Expr, g: Tensor, u: Tensor | None = None) -> Tensor:
    """The activation expression on tensors; shapes [..., I] in, [..., I] out."""
    return run(*encode(expr), g, u)


def decode(ops: Sequence[int], consts: Sequence[float]) -> sp.Expr:
    """The expression that a program computes: the inverse of `encode` up to sympy's own rearrangement."""
    return interpret(ops, consts, {OP_G: G, OP_U: U}, Expressions())
