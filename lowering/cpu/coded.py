"""From tensors of codes and scales to the kernels that decode them a few rows at a time (kernels/coded.h).

Taken: codes of a byte (float8 of every kind, int8, uint8) and of half a byte, along the inputs, in words of any order; scales and zero
points of any blocks, in fp32, bf16, fp16 or as exponents. The rest is for `stored`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir import Form, Stored
from ...ir.operands import CODED, Operands
from ...ir.records import Layout, Storage
from ...ir.stored import ALL, Exponent, Scale, Zero
from ..reference import generic
from . import build, experts
from .call import _I64, _PTR, Args, Call

HALVES, INT8, E4M3, BYTES = range(4)  # Kind
NUMBERS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4, torch.float8_e8m0fnu: 4}  # NumberKind
_BITS = 5
_END = 3 + len(CODED)  # arguments of the op before `add` and the plain ones
_RUN, _WORD = 16, 8  # codes of half a byte in a run, and in 32 bits


class Coding(ctypes.Structure):
    """Mirror of `struct Coding`."""

    _fields_ = [
        *((n, _PTR) for n in ("scales", "zeros", "table")),
        *((n, _I64) for n in ("scale_expert", "scale_n", "scale_k", "rows", "columns", "step", "second")),
        *((n, _I64) for n in ("kind", "scale_kind", "zero_kind")),
        ("order", _I64 * _RUN),
    ]


class CodedArgs(ctypes.Structure):
    """Mirror of `struct CodedArgs`."""

    _fields_ = [("args", Args), ("up", Coding), ("down", Coding)]


@dataclass(frozen=True)
class Prepared:
    """A call without its tokens, and how its codes lie."""

    library: Any
    call: Call
    up: Coding
    down: Coding


_MOST = 4096  # operands that are remembered
_found: dict[Any, Prepared | None] = {}
_seen: dict[Any, Prepared] = {}  # by an op's own arguments


def key_of(args: Sequence[Any]) -> Any:
    """Everything about the arguments of `experts_stored` but its tokens and the values of its parameters."""
    x = args[0]
    lists = [[(t.data_ptr(), t.stride(), t.shape, t.dtype) for t in ts] for ts in args[3:_END]]
    plain = [tuple(a) if isinstance(a, (list, tuple)) else a for a in args[_END + 1 :]]
    return x.dtype, x.shape[1], tuple([tuple(ts) for ts in lists]), tuple(plain)


def again(key: Any) -> Prepared | None:
    """What operands come to that `remember` was told of."""
    return _seen.get(key)


def remember(key: Any, x: Tensor, p: Operands[Tensor], layout: Layout, storage: Storage) -> None:
    """Let `again` know, if the kernels take these operands."""
    found = _prepared_once(x, p, layout, storage)
    if found is not None:
        if len(_seen) > _MOST:
            _seen.clear()
        _seen[key] = found


def forward(
    x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], add: Tensor | None, layout: Layout, storage: Storage
) -> Tensor | None:
    """x [T, H], ids and weights [T, k] -> [T, H_out] in x.dtype; None where the kernels do not take these operands."""
    found = _prepared_once(x, p, layout, storage)
    return None if found is None else run(found, x, ids, weights, add)


def run(found: Prepared, x: Tensor, ids: Tensor, weights: Tensor, add: Tensor | None) -> Tensor:
    """As `forward`. Raises MemoryError where there is none for the workspace."""
    generic.check_rows(x, ids, weights)
    x = x if x.stride(1) == 1 else x.contiguous()
    call = found.call.on(x, ids.long().contiguous(), weights.float().contiguous())
    out = x.new_empty(x.shape[0], call.args.out_features)
    call.tensors(out=out, add=None if add is None else add.to(x.dtype).contiguous())
    if found.library.moe_experts_coded(ctypes.byref(CodedArgs(call.args, found.up, found.down))):
        raise MemoryError("no memory for the expert kernel's workspace")
    return out


def _prepared_once(x: Tensor, p: Operands[Tensor], layout: Layout, storage: Storage) -> Prepared | None:
    key = (x.dtype, x.shape[1], layout, storage, *map(experts._described, p.groups()))
    if key not in _found:
        if len(_found) > _MOST:
            _found.clear()
        _found[key] = _prepared(x, p, layout, storage)
    return _found[key]


def _prepared(x: Tensor, p: Operands[Tensor], layout: Layout, storage: Storage) -> Prepared | None:
    up, down = storage.stored()
    plain = not any(storage.rows()) and not layout.num_identity and x.shape[1] > 0 and experts._depth(layout.act_ops) <= experts._MAX_DEPTH
    biases = all(b.dtype == x.dtype and b.is_contiguous() for b in (*p.up_bias, *p.down_bias))
    if up is None or down is None or not plain or not biases or x.dtype not in experts.CODED_TYPES:
        return None
    if not _taken(p, "up", up, layout.up_transposed) or not _taken(p, "down", down, layout.down_transposed):
        return None
    library = build.library("coded", x.dtype)
    if library is None:
        return None
    call = Call(layout, x.shape[1], p.down)
    rows, words = p.down[0].shape[-2:]
    call.set(inter=down.shape((rows, words))[1], out_features=rows)
    held = p.map(lambda t: t)  # the same tensors; codes by their bytes
    call.up("", [t.view(torch.uint8) for t in held.up])
    call.down("", [t.view(torch.uint8) for t in held.down])
    call.biases("", p.up_bias, p.down_bias)
    return Prepared(library, call, _coding(call, p, "up", up, layout), _coding(call, p, "down", down, layout))


def takes(how: Stored, transposed: bool) -> bool:
    """Whether the kernels know such codes, for all that the record says."""
    plain = not (how.second or how.indexed or how.shifted or how.scaled == Scale.DIVIDES or how.zeroed not in (Zero.NONE, Zero.PLAIN))
    return plain and not transposed and _kind(how) is not None


def _taken(p: Operands[Tensor], name: str, how: Stored, transposed: bool) -> bool:
    codes, scales, zeros, table = (getattr(p, f"{name}{what}") for what in ("", "_scale", "_zero", "_table"))
    alike = all(len({(t.dtype, t.stride()) for t in ts}) <= 1 for ts in (codes, scales, zeros))
    if not takes(how, transposed) or not alike or codes[0].stride(-1) != 1 or any(t.dtype not in NUMBERS for t in (*scales, *zeros)):
        return False
    if zeros and (not how.grid or zeros[0].stride() != scales[0].stride() or how.exponents):
        return False
    if scales and (bool(how.exponents) or scales[0].dtype is torch.float8_e8m0fnu) != (NUMBERS[scales[0].dtype] == NUMBERS[torch.uint8]):
        return False
    return not table or (table[0].dtype is torch.float32 and table[0].is_contiguous())


def _kind(how: Stored) -> int | None:
    if how.axis:
        return HALVES if how.axis == 2 and how.bits == 4 and _order(how) is not None else None
    if how.bits != 8 or how.tabled:
        return None
    if how.zeroed:
        return BYTES
    if how.dtype is torch.int8 and not how.offset and not how.values:
        return INT8
    return E4M3 if how.dtype is torch.float8_e4m3fn and not how.offset else BYTES


@functools.lru_cache(maxsize=256)
def _order(how: Stored) -> tuple[int, ...] | None:
    """Where each code of a run begins in its 32 bits; None where one lies in others."""
    per, width = len(how.order), 8 * how.dtype.itemsize
    if _RUN % per:
        return None
    bits = [j // per * width + how.bits * how.order[j % per] for j in range(_RUN)]
    return tuple(b % 32 for b in bits) if all(b // 32 == j // _WORD for j, b in enumerate(bits)) else None


def _coding(call: Call, p: Operands[Tensor], name: str, how: Stored, layout: Layout) -> Coding:
    scales, zeros = getattr(p, f"{name}_scale"), getattr(p, f"{name}_zero")
    made = Coding(rows=how.rows, columns=how.columns, kind=_kind(how), step=1)
    if name == "up" and layout.gated:
        made.step, made.second = {Form.SEPARATE: (1, 0), Form.CONCAT: (1, call.args.inter), Form.INTERLEAVED: (2, 1)}[Form(layout.form)]
    parts = 2 if made.second else 1  # one tensor has both
    if scales:
        made.scales, made.scale_kind = call._array(_PTR, [t.data_ptr() for t in scales] * parts), NUMBERS[scales[0].dtype]
        made.scale_kind = _BITS if how.exponents == Exponent.BITS else made.scale_kind
        made.scale_expert, made.scale_n, made.scale_k = _strides(scales[0], how, layout.stacked)
    if zeros:
        made.zeros, made.zero_kind = call._array(_PTR, [t.data_ptr() for t in zeros] * parts), NUMBERS[zeros[0].dtype]
    table = getattr(p, f"{name}_table")
    made.table = table[0].data_ptr() if table else _table(call, how)
    made.order = (_I64 * _RUN)(*(_order(how) or (0,) * _RUN)) if how.axis else made.order
    return made


def _table(call: Call, how: Stored) -> int:
    """What each code stands for, in fp32."""
    every = torch.arange(2**how.bits, dtype=torch.uint8)
    values = how.value(every if how.axis else every.view(how.dtype), None, torch.float32).contiguous()
    call.keep.append(values)
    return values.data_ptr()


def _strides(scales: Tensor, how: Stored, stacked: bool) -> Sequence[int]:
    """Between experts, along blocks of outputs, along blocks of inputs; 0 along a dim that scales do not have."""
    own = scales.stride()
    lead, own = (own[0], own[1:]) if stacked else (0, own)
    return (lead, *own) if how.grid else (lead, own[0] if how.rows != ALL else 0, own[0] if how.columns != ALL else 0)
