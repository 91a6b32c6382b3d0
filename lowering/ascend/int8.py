"""Experts in int8: how weights are quantised, and which calls a block may become, as a table of laws asked from top to bottom.

As in `law`, a row says what it cannot express and the first with nothing to say is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy as sp
import torch
from torch import Tensor

from ...ir.stored import Scale
from . import law, schemas
from .formats import refuses_nz

Quantize = str | tuple[str, float] | None  # the option: a chain, or a chain with its alpha
CLIP = "npu_swiglu_clip_quant"
MAX_INNER = 10496  # of npu_dequant_swiglu_quant with groups
MIN_INNER = 256  # narrower ones were seen to be corrupted in few rows (vllm-ascend 12424: halves of 96, 128 and 192 channels)
MAX_FUSED = 10240  # channels of the up projection in npu_grouped_matmul_swiglu_quant_v2
MAX_K = 65536


# ---- weights -----------------------------------------------------------------------------------------------------------


def channel_scale(weight: Tensor) -> Tensor:
    """[E, in, out] -> [E, out]: max |w| / 127 over the inner dim, in fp32."""
    return weight.float().abs().amax(1) / 127.0


def to_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """[E, in, out] -> int8; `scale` [E, out] is the one that is multiplied back, in the precision it is kept in."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    return (weight.float() / safe[:, None]).round().clamp(-128, 127).to(torch.int8)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """npu_grouped_matmul wants bf16 scales for bf16 outputs, fp32 ones for fp16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


# ---- what a block asks for, and what takes it ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A block whose experts are to run in int8. nz: weights may be in the fractal format; pairs: there are low-rank ones.

    smooth: what the smooth scales of the down projection do to rows; smooth_dtype: their type.
    """

    chain: str
    activation: sp.Expr
    form: int
    hidden: int
    inner: int
    biases: bool
    weight_on_input: bool
    dtype: torch.dtype
    nz: bool = False
    pairs: bool = False
    smooth: Scale = Scale.NONE
    smooth_dtype: torch.dtype | None = None

    @property
    def swiglu(self) -> bool:
        return law.swiglu(self.activation, self.form)


Check = Callable[[Problem], str | None]


@dataclass(frozen=True)
class Row:
    """One chain of calls. `up_scale`: the dtype in which it wants the scales of the first product, None for that of the second."""

    name: str
    calls: str
    holds: str
    checks: tuple[Check, ...]
    up_scale: torch.dtype | None = None

    def refuses(self, p: Problem) -> str | None:
        """The first objection, or None."""
        return next((why for c in self.checks if (why := c(p)) is not None), None)


def _plain(p: Problem) -> str | None:
    """What every chain demands."""
    if p.biases:
        return "biases would have to be quantised with the weights"
    if p.dtype not in (torch.float16, torch.bfloat16):
        return f"the quantised product gives fp16 or bf16, not {p.dtype}"
    if p.pairs:
        return "low-rank pairs read rows that are not rounded"
    return "the routing weight is applied to the input" if p.weight_on_input else None


def _swiglu(p: Problem) -> str | None:
    return None if p.swiglu else "the op is SwiGLU of [gate | up]"


def _not_smooth(p: Problem) -> str | None:
    return "rows have smooth scales between the products: the op takes them for weights of 4 bits only" if p.smooth else None


def _smooth_as_rows(p: Problem) -> str | None:
    """npu_dynamic_quant wants smooth scales in the type of its rows: others would be rounded, and 1 / k in the weights would not."""
    if p.smooth == Scale.NONE or p.smooth == Scale.TIMES and p.smooth_dtype == p.dtype:
        return None
    how = "divide" if p.smooth == Scale.DIVIDES else f"are {p.smooth_dtype}"
    return f"smooth scales between the products {how}: npu_dynamic_quant multiplies by {p.dtype} ones, as the rows are"


def _not_clipped(p: Problem) -> str | None:
    return "rows are to be clipped" if p.chain == "w8a8c8" else None


def _clipped(p: Problem) -> str | None:
    if p.chain != "w8a8c8":
        return "rows are not to be clipped"
    if not schemas.custom(CLIP):
        return f"torch.ops.custom.{CLIP} is not registered: it comes with the custom ops of cann-recipes-infer"
    if p.dtype != torch.bfloat16:
        return f"{CLIP} takes bf16, not {p.dtype}"
    if not p.swiglu:
        return f"{CLIP} is SwiGLU of [gate | up]"
    if p.inner % 64 or 2 * p.inner > MAX_INNER:
        return f"an intermediate size of {p.inner}: {CLIP} takes multiples of 64, {MAX_INNER // 2} at most"
    return None


def _fractal(p: Problem) -> str | None:
    """The fused kernel reads int8 weights in the fractal format only."""
    if not p.nz:
        return "its weights must be in the fractal format (weight_format='nz')"
    return refuses_nz((p.hidden, 2 * p.inner), torch.int8)


def _fused_limits(p: Problem) -> str | None:
    if 2 * p.inner > MAX_FUSED or p.hidden >= MAX_K:
        return f"a product of [{p.hidden}, {2 * p.inner}]: the op takes up to [{MAX_K - 1}, {MAX_FUSED}]"
    return None


def _inner_limits(p: Problem) -> str | None:
    if p.inner % 64 or p.inner > MAX_INNER:
        return f"an intermediate size of {p.inner}: it must be a multiple of 64, {MAX_INNER} at most"
    return f"an intermediate size of {p.inner}: below {MIN_INNER} few rows came out wrong" if p.inner < MIN_INNER else None


CHAINS: tuple[Row, ...] = (
    Row(
        "clipped",
        f"int8 grouped_matmul, {CLIP}",
        "the first product comes out scaled; one op does SwiGLU, clips each row to alpha times its largest value and quantises it",
        (_plain, _clipped),
    ),
    Row(
        "in one kernel",
        "npu_grouped_matmul_swiglu_quant_v2",
        "product, scales, silu(left) · right and dynamic int8 in one launch: the sums are never written",
        (_plain, _not_clipped, _not_smooth, _swiglu, _fractal, _fused_limits),
        torch.float32,
    ),
    Row(
        "sums, then one op",
        "int8 grouped_matmul, npu_dequant_swiglu_quant",
        "raw sums, then scales, silu(left) · right and dynamic int8 in one op, in fp32",
        (_plain, _not_clipped, _swiglu, _inner_limits),
        torch.float32,
    ),
    Row(
        "step by step",
        "int8 grouped_matmul, activation, npu_dynamic_quant",
        "the first product comes out scaled in the dtype of the rows; any activation; rows are quantised by the op for it",
        (_plain, _not_clipped, _smooth_as_rows),
    ),
)
CLIPPED, FUSED, SUMS, STEPS = CHAINS


def choose(p: Problem) -> tuple[Row | None, list[tuple[Row, str]]]:
    """The row that is taken (None: the block stays in its own precision), and what every row before it objected to."""
    refused: list[tuple[Row, str]] = []
    for row in CHAINS:
        why = row.refuses(p)
        if why is None:
            return row, refused
        refused.append((row, why))
    return None, refused


def why_not(p: Problem) -> str | None:
    """Why a block cannot be quantised as asked, or None."""
    row, refused = choose(p)
    if row is not None:
        return None
    return refused[0][1] if p.chain == "w8a8c8" else refused[-1][1]


def chain_of(quantize: Quantize | Sequence[object]) -> tuple[str | None, float]:
    """(chain, alpha) of the option; alpha 1 clips nothing."""
    return quantize if isinstance(quantize, (tuple, list)) else (quantize, 1.0)  # type: ignore[return-value]
