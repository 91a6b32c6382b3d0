"""Activations as expressions: sympy on the IR side, a postfix program of plain numbers on the op side.

An activation is any pointwise function of the two up-projections of one expert, ``g`` (first) and ``u`` (second).
It is data, not a class: a new activation needs no new code, only functions that `FUNCTIONS` knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor

G, U = sp.symbols("g u", real=True)


class sigmoid(sp.Function):  # type: ignore[misc]
    nargs = 1

    def _eval_is_positive(self) -> bool:
        return True


class relu(sp.Function):  # type: ignore[misc]
    nargs = 1


class softplus(sp.Function):  # type: ignore[misc]
    nargs = 1

    def _eval_is_positive(self) -> bool:
        return True


class gelu_tanh(sp.Function):  # type: ignore[misc]
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), Hendrycks and Gimpel 2016."""

    nargs = 1


class clamp(sp.Function):  # type: ignore[misc]
    """clamp(x, lo, hi); an absent limit is -oo or oo."""

    nargs = 3


def silu(x: Any) -> Any:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def gelu(x: Any) -> Any:
    """x/2 * (1 + erf(x / sqrt 2))."""
    return x * (1 + sp.erf(x / sp.sqrt(2))) / 2


SWIGLU = silu(G) * U

# opcode -> (sympy head or None, torch function); the position in this list is the opcode and part of the op's contract
_UNARY: list[tuple[Any, Callable[[Tensor], Tensor]]] = [
    (sigmoid, torch.sigmoid),
    (sp.tanh, torch.tanh),
    (sp.exp, torch.exp),
    (sp.log, torch.log),
    (sp.erf, torch.erf),
    (relu, torch.relu),
    (softplus, F.softplus),
    (gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    (sp.Abs, torch.abs),
]
OP_G, OP_U, OP_CONST, OP_ADD, OP_MUL, OP_POW, OP_CLAMP = range(7)
OP_UNARY = 16  # opcodes 16.. are _UNARY
FUNCTIONS = tuple(head for head, _ in _UNARY) + (clamp,)


class UnknownActivation(ValueError):
    """The expression holds something that no opcode stands for."""


def encode(expr: sp.Expr) -> tuple[list[int], list[float]]:
    """Postfix program (opcodes, constants) of an activation expression in `G` and `U`.

    Raises `UnknownActivation` naming the sub-expression that has no opcode.
    """
    ops: list[int] = []
    consts: list[float] = []

    def emit(e: Any) -> None:
        if e == G:
            ops.append(OP_G)
        elif e == U:
            ops.append(OP_U)
        elif e.is_number:
            ops.append(OP_CONST)
            consts.append(float(e))
        elif isinstance(e, (sp.Add, sp.Mul)):
            emit(e.args[0])
            for a in e.args[1:]:
                emit(a)
                ops.append(OP_ADD if isinstance(e, sp.Add) else OP_MUL)
        elif isinstance(e, sp.Pow) and e.exp.is_number:
            emit(e.base)
            ops.append(OP_POW)
            consts.append(float(e.exp))
        elif isinstance(e, clamp) and all(a.is_number for a in e.args[1:]):
            emit(e.args[0])
            ops.append(OP_CLAMP)
            consts.extend((float(e.args[1]), float(e.args[2])))
        else:
            for i, (head, _) in enumerate(_UNARY):
                if isinstance(e, head):
                    emit(e.args[0])
                    ops.append(OP_UNARY + i)
                    return
            raise UnknownActivation(f"no opcode for {e}")

    emit(sp.sympify(expr))
    return ops, consts


def run(ops: Sequence[int], consts: Sequence[float], g: Tensor, u: Tensor | None = None) -> Tensor:
    """Evaluate a postfix program on tensors of one shape; differentiable, in the dtype of `g`."""
    stack: list[Any] = []
    const = iter(consts)
    for op in ops:
        if op == OP_G:
            stack.append(g)
        elif op == OP_U:
            stack.append(u)
        elif op == OP_CONST:
            stack.append(next(const))
        elif op == OP_ADD:
            b = stack.pop()
            stack[-1] = stack[-1] + b
        elif op == OP_MUL:
            b = stack.pop()
            stack[-1] = stack[-1] * b
        elif op == OP_POW:
            stack[-1] = stack[-1] ** next(const)
        elif op == OP_CLAMP:
            lo, hi = next(const), next(const)
            stack[-1] = torch.clamp(stack[-1], lo, hi)
        else:
            stack[-1] = _UNARY[op - OP_UNARY][1](stack[-1])
    return torch.full_like(g, stack[-1]) if isinstance(stack[-1], float) else stack[-1]


def evaluate(expr: sp.Expr, g: Tensor, u: Tensor | None = None) -> Tensor:
    """The activation expression on tensors; shapes [..., I] in, [..., I] out."""
    return run(*encode(expr), g, u)


def describe(expr: sp.Expr) -> str:
    """A reader's name for an activation: SwiGLU, GeGLU, ReLU², or the expression itself."""
    named: dict[Any, str] = {
        SWIGLU: "SwiGLU",
        silu(U) * G: "SwiGLU (up first)",
        gelu(G) * U: "GeGLU",
        gelu_tanh(G) * U: "GeGLU (tanh)",
        relu(G) * U: "ReGLU",
        sigmoid(G) * U: "GLU",
        silu(G): "SiLU",
        gelu(G): "GELU",
        gelu_tanh(G): "GELU (tanh)",
        relu(G): "ReLU",
        relu(G) ** 2: "ReLU²",
    }
    decimals = expr.replace(lambda e: e.is_Rational and not e.is_Integer, lambda e: sp.Float(str(float(e))))
    return named.get(expr) or re.sub(r"(\.\d*?[1-9])0+\b", r"\1", str(decimals).replace("**", "^"))


def decode(ops: Sequence[int], consts: Sequence[float]) -> sp.Expr:
    """The expression that a program computes: the inverse of `encode` up to sympy's own rearrangement."""
    stack: list[Any] = []
    const = iter(consts)

    def number() -> Any:
        return sp.nsimplify(next(const), rational=True)

    for op in ops:
        if op in (OP_G, OP_U):
            stack.append(G if op == OP_G else U)
        elif op == OP_CONST:
            stack.append(number())
        elif op in (OP_ADD, OP_MUL):
            b = stack.pop()
            stack[-1] = stack[-1] + b if op == OP_ADD else stack[-1] * b
        elif op == OP_POW:
            stack[-1] = stack[-1] ** number()
        elif op == OP_CLAMP:
            lo, hi = next(const), next(const)
            stack[-1] = clamp(stack[-1], *(sp.sympify(v) if abs(v) == float("inf") else sp.nsimplify(v, rational=True) for v in (lo, hi)))
        else:
            stack[-1] = _UNARY[op - OP_UNARY][0](stack[-1])
    return stack[-1]
