"""A tensor that is not there yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


class NotRecorded(Exception):
    """The call does something that a plan cannot hold; it runs step by step."""


class Later:
    """What is known of a tensor before its memory is: dtype, shape, strides (elements), and where it starts.

    `root`: which operand or buffer of the call it lies in, `start`: elements from that one's first. `residue`: the address of the
    root's first element modulo 16, which kernels are compiled for. It stands where a tensor stands in code that only launches kernels;
    anything else that is asked of it raises `NotRecorded`.
    """

    __slots__ = ("device", "dtype", "residue", "root", "shape", "start", "strides")

    def __init__(
        self,
        root: int,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        start: int = 0,
        residue: int = 0,
    ) -> None:
        self.root, self.shape, self.strides, self.start = root, tuple(shape), tuple(strides), start
        self.dtype, self.device, self.residue = dtype, device, residue

    def __getattr__(self, name: str) -> Any:
        raise NotRecorded(f"Tensor.{name}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotRecorded(str(function))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def stride(self, dim: int | None = None) -> Any:
        return self.strides if dim is None else self.strides[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def is_contiguous(self) -> bool:
        return self.numel() == 0 or all(s == c or n == 1 for s, c, n in zip(self.strides, packed(self.shape), self.shape))

    def contiguous(self) -> Later:
        if not self.is_contiguous():
            raise NotRecorded("a copy of a strided operand")
        return self

    def to(self, dtype: torch.dtype) -> Later:
        if dtype != self.dtype:
            raise NotRecorded("a copy in another dtype")
        return self

    def data_ptr(self) -> int:
        """Not the address, but a number that is the same modulo 16."""
        return (self.residue + self.start * self.dtype.itemsize) % 16

    def reach(self) -> tuple[int, int]:
        """Bytes [from, to) of the root that the elements lie in."""
        first = self.start * self.dtype.itemsize
        last = sum(s * (n - 1) for s, n in zip(self.strides, self.shape))
        return first, first + (last + 1) * self.dtype.itemsize if self.numel() else first

    def _at(self, start: int, shape: Sequence[int], strides: Sequence[int]) -> Later:
        return Later(self.root, shape, strides, self.dtype, self.device, self.start + start, self.residue)

    def transpose(self, a: int, b: int) -> Later:
        shape, strides = list(self.shape), list(self.strides)
        shape[a], shape[b] = shape[b], shape[a]
        strides[a], strides[b] = strides[b], strides[a]
        return self._at(0, shape, strides)

    def t(self) -> Later:
        return self.transpose(0, 1)

    def view(self, *shape: Any) -> Later:
        """Of a contiguous one; one size may be -1. Or the same memory in a dtype that is no wider."""
        if isinstance(shape[0], torch.dtype):
            return self._as(shape[0])
        known = math.prod(n for n in shape if n >= 0)
        sizes = [self.numel() // max(known, 1) if n < 0 else n for n in shape]
        return self.contiguous()._at(0, sizes, packed(sizes))

    def _as(self, dtype: torch.dtype) -> Later:
        more, rest = divmod(self.dtype.itemsize, dtype.itemsize)
        if rest or (more > 1 and self.strides[-1] != 1):
            raise NotRecorded("a view in a wider dtype")
        shape = (*self.shape[:-1], self.shape[-1] * more)
        strides = (*(s * more for s in self.strides[:-1]), self.strides[-1])
        return Later(self.root, shape, strides, dtype, self.device, self.start * more, self.residue)

    def __getitem__(self, index: Any) -> Later:
        """Whole numbers, slices with a positive step, None and one Ellipsis."""
        index = index if isinstance(index, tuple) else (index,)
        taken = sum(i is not None and i is not Ellipsis for i in index)
        if Ellipsis not in index:
            index = (*index, Ellipsis)
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (self.ndim - taken), *index[at + 1 :])
        start, shape, strides, dim = 0, [], [], 0
        for i in index:
            if i is None:
                shape.append(1)
                strides.append(self.shape[dim] * self.strides[dim] if dim < self.ndim else 1)
                continue
            stride = self.strides[dim]
            if isinstance(i, slice):
                first, last, step = i.indices(self.shape[dim])
                shape.append(max(0, -(-(last - first) // step)))
                strides.append(stride * step)
            else:
                first = i % self.shape[dim]
            start += first * stride
            dim += 1
        return self._at(start, shape, strides)

    def split(self, size: int, dim: int = 0) -> list[Later]:
        before = (slice(None),) * (dim % self.ndim)
        return [self[(*before, slice(i, i + size))] for i in range(0, self.shape[dim], size)]

    def chunk(self, chunks: int, dim: int = 0) -> list[Later]:
        return self.split(-(-self.shape[dim] // chunks), dim)

    def unbind(self, dim: int = 0) -> list[Later]:
        before = (slice(None),) * (dim % self.ndim)
        return [self[(*before, i)] for i in range(self.shape[dim])]


def packed(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))
