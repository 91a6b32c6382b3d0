"""Products of groups, activations and rows in bytes, by the ops' documents; what `documents` says of these holds here."""

from __future__ import annotations

import math
import struct
from operator import mul
from typing import Any

import torch
from torch import Tensor

Row = list[float]
NAN = math.nan
# What the pages call by torch's own numbers of dtypes.
DTYPES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}


# ---- numbers -----------------------------------------------------------------------------------------------------------------


def single(v: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("f", struct.pack("f", v))[0])


def sigmoid(v: float) -> float:
    """1 / (1 + e^-v), without overflow."""
    return 1 / (1 + math.exp(-v)) if not v < 0 else math.exp(v) / (1 + math.exp(v))


def in_bytes(row: Row) -> tuple[list[int], float]:
    """Scale = max|v| / 127, byte = round(v / scale): aclnnDynamicQuant.

    Halves go to the even neighbour ("rint" is what aclnnDequantSwigluQuantV2 names). A row of zeros divides by zero, which no page
    speaks of; this assumes bytes of zero. Bytes of what is not a number are open.
    """
    if any(math.isnan(v) for v in row):
        return [-1] * len(row), NAN
    scale = single(max(abs(v) for v in row) / 127)
    return [round(v / scale) if scale else 0 for v in row], scale


def owners(groups: Tensor, kind: int, rows: int) -> list[int | None]:
    """The group of each row by aclnnGroupedMatmulV5's list: sums so far (0), sizes (1) or pairs of group and size (2); None behind."""
    given, out = groups.tolist(), []
    for i, g in enumerate(given):
        owner, size = (i, g - (given[i - 1] if i else 0)) if kind == 0 else (i, g) if kind == 1 else g
        out += [owner] * size
    return (out + [None] * rows)[:rows]


def made(values: Any, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor of nested or flat lists; without the shape it has the lists'."""
    t = torch.tensor(values, dtype=dtype)
    return t.reshape(shape) if shape else t


# ---- products and activations ------------------------------------------------------------------------------------------------


def nibbles(word: int) -> list[int]:
    """Eight signed numbers of 4 bits; "8 int4 in an int32" (npu_quantize) names no order, and the lowest bits first are assumed."""
    return [((word >> 4 * j) & 15) - (16 if (word >> 4 * j) & 8 else 0) for j in range(8)]


def columns(weight: Tensor, width: int, scale: Tensor | None, offset: Tensor | None) -> list[Row]:
    """Columns of one expert's [K, N]; int32 is eight int4 along N, or along K where that is a transposed view's last axis in memory.

    (w + offset) * scale with [N] numbers, or [G, N] for G parts of K of one length: formula 4 of npu_grouped_matmul.
    """
    rows = weight.detach().tolist()
    if weight.dtype == torch.int32:
        if len(rows) == width:
            rows = [[v for word in row for v in nibbles(word)] for row in rows]
        else:
            rows = [list(row) for words in rows for row in zip(*(nibbles(w) for w in words), strict=True)]
    if scale is not None:
        factors = scale.reshape(-1, scale.shape[-1]).tolist()
        added = [[0.0] * len(factors[0])] * len(factors) if offset is None else offset.reshape(-1, scale.shape[-1]).tolist()
        part = width // len(factors)
        rows = [[(w + o) * f for w, o, f in zip(r, added[i // part], factors[i // part], strict=True)] for i, r in enumerate(rows)]
    return [list(c) for c in zip(*rows, strict=True)]


def grouped_matmul(
    x: list[Tensor], weight: list[Tensor], *, bias: Any = None, scale: Any = None, antiquant_scale: Any = None,
    antiquant_offset: Any = None, per_token_scale: Any = None, group_list: Tensor, split_item: int = 0, group_type: int = 0,
    group_list_type: int = 0, output_dtype: int | None = None, tuning_config: Any = None,
) -> list[Tensor]:  # fmt: skip
    """y = (x W_e + bias) scale per_token_scale for bytes, x ((W_e + offset) scale) + bias otherwise: npu_grouped_matmul, op-plugin's page.

    A bias that is not of integers comes after the scales. (torch_npu's own page has + per_token_scale; CANN's and op-plugin's a product.)
    """
    assert group_type == 0 and split_item in (2, 3) and len(x) == 1, "one x, rows in groups, one result"
    alone = len(weight) == 1 and weight[0].dim() == 3

    def of(given: Any, e: int) -> Any:
        return None if not given else given[0][e] if alone else given[e]

    rows, k = x[0].detach().tolist(), x[0].shape[1]
    per_token = per_token_scale[0].tolist() if per_token_scale else [1.0] * len(rows)
    stacks: dict[int, tuple[list[Row], Row, Row, bool]] = {}
    out: list[Row | None] = []
    for row, e, size in zip(rows, owners(group_list, group_list_type, len(rows)), per_token, strict=True):
        if e is None:
            out.append(None)
            continue
        if e not in stacks:
            cols = columns(of(weight, e), k, of(antiquant_scale, e), of(antiquant_offset, e))
            b, s = of(bias, e), of(scale, e)
            whole = b is not None and not b.is_floating_point()
            stacks[e] = cols, [0.0] * len(cols) if b is None else b.tolist(), [1.0] * len(cols) if s is None else s.tolist(), whole
        cols, added, factors, whole = stacks[e]
        sums = [sum(map(mul, row, c)) for c in cols]
        out.append([(v + b) * f * size if whole else v * f * size + b for v, b, f in zip(sums, added, factors, strict=True)])
    n = weight[0].shape[-1] * (8 if weight[0].dtype == torch.int32 and weight[0].shape[-2] == k else 1)
    dtype = x[0].dtype if output_dtype is None else output_dtype if isinstance(output_dtype, torch.dtype) else DTYPES[output_dtype]
    # "Any portion not specified in groupList will not be updated": open.
    empty = [NAN if dtype.is_floating_point else -1] * n
    return [made([empty if r is None else r for r in out], dtype, len(rows), n)]


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """a sigmoid(a) b of the two halves along an axis: npu_swiglu; that a is the first is read from the order in which they are named."""
    moved = x.detach().movedim(dim, -1)
    half = moved.shape[-1] // 2
    out = [[a * sigmoid(a) * b for a, b in zip(r[:half], r[half:], strict=True)] for r in moved.reshape(-1, 2 * half).tolist()]
    return made(out, x.dtype, *moved.shape[:-1], half).movedim(-1, dim).contiguous()


def clipped_swiglu(
    x: Tensor, *, dim: int = -1, alpha: float = 1.702, limit: float = 7.0, bias: float = 1.0, interleaved: bool = True
) -> Tensor:
    """a sigmoid(alpha a) (b + bias), a = min(a, limit), b within +-limit, a and b every other number or halves: npu_clipped_swiglu."""
    axis, shape = dim % x.dim(), list(x.shape)
    width = math.prod(shape[axis:])  # The axis and all behind it are one, says the page.
    out = []
    for row in x.detach().reshape(-1, width).tolist():
        left, right = (row[::2], row[1::2]) if interleaved else (row[: width // 2], row[width // 2 :])
        for a, b in zip(left, right, strict=True):
            a, b = min(a, limit), min(max(b, -limit), limit)
            out.append(a * sigmoid(alpha * a) * (b + bias))
    shape[axis] //= 2
    return made(out, x.dtype, *shape)


def quantized(rows: list[Row | None], width: int) -> tuple[Tensor, Tensor]:
    """Each row in bytes with its scale; rows of no group are open."""
    both = [([-1] * width, NAN) if r is None else in_bytes(r) for r in rows]
    return made([q for q, _ in both], torch.int8, len(rows), width), made([s for _, s in both], torch.float32, len(rows))


def dynamic_quant(x: Tensor, *, smooth_scales: Tensor | None = None, group_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bytes and scales of x smooth; smooth of row r is that of the group whose end, in sums so far, is behind r: npu_dynamic_quant."""
    rows, width = x.detach().reshape(-1, x.shape[-1]).tolist(), x.shape[-1]
    if smooth_scales is None:
        products: list[Row | None] = list(rows)
    else:
        factors = smooth_scales.reshape(-1, width).tolist()
        group = [0] * len(rows) if group_index is None else owners(group_index, 0, len(rows))
        products = [None if g is None else list(map(mul, r, factors[g])) for r, g in zip(rows, group, strict=True)]
    y, scale = quantized(products, width)
    return y.reshape(x.shape), scale.reshape(x.shape[:-1])


def dequant_swiglu_quant(
    x: Tensor, *, weight_scale: Tensor, activation_scale: Tensor, group_index: Tensor, activate_left: bool = False, quant_mode: int = 0,
    quant_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """v = x weight_scale_e activation_scale, then swish(one half) (other half) quant_scale_e in bytes: npu_dequant_swiglu_quant."""
    assert quant_mode == 1, "the page takes nothing else with groups"
    half = x.shape[1] // 2
    weights, tokens = weight_scale.reshape(-1, 2 * half).tolist(), activation_scale.flatten().tolist()
    smooth = None if quant_scale is None else quant_scale.tolist()
    out: list[Row | None] = []
    for row, token, e in zip(x.tolist(), tokens, owners(group_index, 1, len(tokens)), strict=True):
        if e is None:
            out.append(None)
            continue
        v = [a * w * token for a, w in zip(row, weights[e], strict=True)]
        swished, other = (v[:half], v[half:]) if activate_left else (v[half:], v[:half])
        factors = [1.0] * half if smooth is None else smooth[e] if isinstance(smooth[e], list) else [smooth[e]] * half
        out.append([a * sigmoid(a) * b * f for a, b, f in zip(swished, other, factors, strict=True)])
    return quantized(out, half)


def grouped_matmul_swiglu_quant_v2(
    x: Tensor, weight: list[Tensor], weight_scale: list[Tensor], x_scale: Tensor, group_list: Tensor, *, group_list_type: int = 0,
    dequant_mode: int = 0, dequant_dtype: int = 6, quant_mode: int = 0, quant_dtype: int = 0, tuning_config: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """c = (x W_e) x_scale w_scale_e; swish(first half) (second half) in bytes: A8W8 of aclnnGroupedMatmulSwigluQuantWeightNzV2."""
    assert dequant_mode == quant_mode == 0 and dequant_dtype == 6, "the page takes nothing else for bytes"
    stacks: dict[int, tuple[list[Row], Row]] = {}
    out: list[Row | None] = []
    for row, size, e in zip(x.tolist(), x_scale.tolist(), owners(group_list, group_list_type, len(x)), strict=True):
        if e is None:
            out.append(None)
            continue
        if e not in stacks:
            stacks[e] = columns(weight[0][e], x.shape[1], None, None), weight_scale[0][e].tolist()
        c = [sum(map(mul, row, column)) * size * s for column, s in zip(*stacks[e], strict=True)]
        half = len(c) // 2
        out.append([a * sigmoid(a) * b for a, b in zip(c[:half], c[half:], strict=True)])
    return quantized(out, weight[0].shape[2] // 2)
