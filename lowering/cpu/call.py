"""From tensors to the kernels' argument struct (kernels/args.h)."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir import Form
from ...ir.operands import Operands
from ..reference.generic import Layout
from .frozen import Sources

log = logging.getLogger("moe_compile")

_NO_MEMORY = 1  # what a kernel returns
_I64, _PTR = ctypes.c_int64, ctypes.c_void_p
_INTS_FIRST = (
    "tokens", "k", "experts", "identity", "hidden", "inter", "out_features", "halves", "weight_on_input", "threads", "n_act",
)  # fmt: skip
_POINTERS = (
    "x", "grad", "ids", "weights", "up", "down", "packed_up", "packed_down", "up_bias", "down_bias", "add", "act_ops", "act_consts",
    "out", "pre", "grad_weights", "grad_up", "grad_down", "grad_up_bias", "grad_down_bias",
)  # fmt: skip
_INTS_LAST = (
    "x_stride", "up_expert", "up_n", "up_k", "down_expert", "down_n", "down_k", "up_bias_expert", "up_bias_n", "down_bias_expert",
    "grad_up_expert", "grad_up_n", "grad_up_k", "grad_down_expert", "grad_down_n", "grad_down_k",
)  # fmt: skip


class Args(ctypes.Structure):
    """Mirror of `struct Args`; unset pointers are null."""

    _fields_ = [
        *((n, _I64) for n in _INTS_FIRST),
        *((n, _PTR) for n in _POINTERS),
        *((n, _I64) for n in _INTS_LAST),
    ]


class Call:
    """One call's `Args`, and what its pointers refer to kept alive, but for the parameters, which the caller holds."""

    def __init__(self, layout: Layout, hidden: int, down: Sequence[Tensor]) -> None:
        self.args = Args()
        self.layout = layout
        self.keep: list[object] = []
        self.sources: Sources | None = None  # of packed weights
        self.set(experts=layout.num_experts, identity=layout.num_identity, hidden=hidden)
        self.set(inter=layout.intermediate(down), out_features=layout.out_features(down), halves=2 if layout.gated else 1)
        self.set(weight_on_input=layout.weight_on_input, n_act=len(layout.act_ops))
        self.set(act_ops=self._array(_I64, layout.act_ops), act_consts=self._array(ctypes.c_float, layout.act_consts))

    def on(self, x: Tensor, ids: Tensor, weights: Tensor) -> Call:
        """A copy for these tokens: what was set before is shared."""
        call = Call.__new__(Call)
        args = call.args = Args.from_buffer_copy(self.args)
        call.layout, call.sources, call.keep = self.layout, self.sources, [self.keep, x, ids, weights]
        args.tokens, args.k = ids.shape
        args.x, args.ids, args.weights = x.data_ptr(), ids.data_ptr(), weights.data_ptr()
        args.x_stride, args.threads = x.stride(0), torch.get_num_threads()
        return call

    def set(self, **values: object) -> None:
        for name, value in values.items():
            setattr(self.args, name, value)

    def tensors(self, **tensors: Tensor | None) -> None:
        for name, t in tensors.items():
            if t is not None:
                self.keep.append(t)
                setattr(self.args, name, t.data_ptr())

    def parameters(self, prefix: str, p: Operands[Tensor] | Operands[Tensor | None]) -> None:
        """The parameters (`prefix` ""), or where the gradients of some go ("grad_")."""
        if any(t is not None for t in p.up):
            self.up(prefix, p.up)
        if any(t is not None for t in p.down):
            self.down(prefix, p.down)
        self.biases(prefix, p.up_bias, p.down_bias)

    def up(self, prefix: str, tensors: Sequence[Tensor | None]) -> None:
        """The up matrices (`prefix` "") or where their gradients go ("grad_"): bases of gate and up, strides."""
        first = next(t for t in tensors if t is not None)
        rows, cols = (-1, -2) if self.layout.up_transposed else (-2, -1)
        n, step = first.stride(rows), first.element_size()
        form, inter = self.layout.form, self.args.inter
        offset = {Form.CONCAT: inter * n, Form.INTERLEAVED: n}.get(Form(form))
        if form == Form.INTERLEAVED:
            n *= 2
        self._bases(prefix + "up", tensors, None if offset is None else offset * step)
        self.set(**{prefix + "up_expert": self._expert_stride(first), prefix + "up_n": n, prefix + "up_k": first.stride(cols)})

    def down(self, prefix: str, tensors: Sequence[Tensor | None]) -> None:
        first = next(t for t in tensors if t is not None)
        rows, cols = (-1, -2) if self.layout.down_transposed else (-2, -1)
        self._bases(prefix + "down", tensors, None)
        strides = {"down_expert": self._expert_stride(first), "down_n": first.stride(rows), "down_k": first.stride(cols)}
        self.set(**{prefix + name: value for name, value in strides.items()})

    def biases(self, prefix: str, up: Sequence[Tensor | None], down: Sequence[Tensor | None]) -> None:
        """Biases are contiguous, so that they and their gradients share strides."""
        first = next((t for t in up if t is not None), None)
        if first is not None:
            offset = {Form.CONCAT: self.args.inter, Form.INTERLEAVED: 1}.get(Form(self.layout.form))
            self._bases(prefix + "up_bias", up, None if offset is None else offset * first.element_size())
            self.set(up_bias_expert=self._expert_stride(first), up_bias_n=2 if self.layout.form == Form.INTERLEAVED else 1)
        first = next((t for t in down if t is not None), None)
        if first is not None:
            self._bases(prefix + "down_bias", down, None)
            self.set(down_bias_expert=self._expert_stride(first))

    def _expert_stride(self, t: Tensor) -> int:
        return t.stride(0) if self.layout.stacked else 0

    def _bases(self, name: str, tensors: Sequence[Tensor | None], second_half: int | None) -> None:
        """Pointers, once more shifted by `second_half` bytes where gate and up share a tensor."""
        bases = [0 if t is None else t.data_ptr() for t in tensors]
        if second_half is not None:
            bases += [b + second_half if b else 0 for b in bases]
        setattr(self.args, name, self._array(_PTR, bases))

    def _array(self, kind: type, values: Sequence[object]) -> int:
        array = (kind * max(len(values), 1))(*values)  # type: ignore[operator]
        self.keep.append(array)
        return ctypes.addressof(array)

    def pack(self, library: Any, sources: Sources) -> bool:
        """Make packed copies of the weights, which are read from now on; False where there is no memory for them."""
        library.moe_packed_bytes.restype = _I64
        try:
            sizes = [library.moe_packed_bytes(ctypes.byref(self.args), which) for which in (0, 1)]
            up, down = (torch.empty(size, dtype=torch.uint8) for size in sizes)
        except RuntimeError as e:
            log.warning("no memory for packed expert weights: %s", e)
            return False
        self.tensors(packed_up=up, packed_down=down)
        self.args.threads = torch.get_num_threads()
        self.run(library.moe_pack)
        self.sources = sources
        return True

    def run(self, function: object) -> bool:
        """False where packed weights are no longer those of the model. Raises MemoryError when the kernel finds no memory."""
        failed = function(ctypes.byref(self.args))  # type: ignore[operator]
        if failed == _NO_MEMORY:
            raise MemoryError("no memory for the expert kernel's workspace")
        return not failed
