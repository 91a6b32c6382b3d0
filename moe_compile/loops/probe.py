"""A copy of the user's module to experiment on: same code, same attributes, random parameters, nothing shared that could change.

Reading a function needs E distinct experts, not E experts' memory: large parameters are `as_strided` windows over one random
buffer, shifted by 16 bytes per expert, so they cost about one expert's memory. Reads work in every op; a write raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_compile.ir import Rejection

_WHOLE = (1 << 20, 1 << 26)  # elements up to which a parameter (3-D and more, 2-D) does not overlap itself
_PERIOD = (1 << 20) - 3  # a prime: rows of any usual length start at different places of the repeated block
_TABLE = 1 << 22  # elements: integer buffers are copied up to this size
_ALIGN = 16  # bytes
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_OWN = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONTAINERS = (list, dict, set)

Read = tuple[str, str]  # (path of a submodule, name of an attribute that the code asked it for)


class Windows:
    """Random tensors of given shapes as windows over one growing random buffer; entries are normal with deviation `scale`.

    Bytes are small whole numbers.
    """

    def __init__(self, device: torch.device, generator: torch.Generator, scale: float) -> None:
        self.device, self.generator, self.scale = device, generator, scale
        self.buffers: dict[torch.dtype, Tensor] = {}
        self.count = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that differs from all others taken; large ones overlap themselves along dim 0."""
        step = _ALIGN // dtype.itemsize
        strides = list(torch.empty(shape, device="meta").stride())
        if len(shape) > 1 and math.prod(shape) > _WHOLE[len(shape) == 2]:
            strides[0] = step
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0
        self.count += 1
        start = self.count * step * 5
        return self._buffer(start + extent, dtype).as_strided(shape, strides, start)

    def _buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """Grows by doubling; windows already handed out keep the buffer that they were cut from."""
        old = self.buffers.get(dtype)
        if old is None or old.numel() < size:
            size = max(size, 1 << 16, 0 if old is None else 2 * old.numel())
            block = torch.randn(min(size, _PERIOD), generator=self.generator) * (self.scale if dtype.is_floating_point else 1)
            block = (block if dtype.is_floating_point else block.round()).to(self.device, dtype)
            self.buffers[dtype] = block.repeat(-(-size // block.numel()))
        return self.buffers[dtype]


class Probe:
    """`module`: a copy of the user's module, all the way down, with probes for parameters. The user's is only read.

    `tensors`: every parameter, buffer and plain tensor attribute of the copy, by path (each tensor once).
    `reads`: what the code asked the copy's modules for so far; `reading()` starts anew.
    Floats become `dtype` if one is given. Integer tables keep their values, but for matrices of bytes, which are weights.
    Raises `Rejection` for what cannot be copied faithfully: hooks inside, shared or unusual tensors, tables without values.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, seed: int = 0, dtype: torch.dtype | None = None, scale: float | None = None
    ) -> None:
        self.device, self.dtype = device, dtype
        self.tensors: dict[str, Tensor] = {}
        self.reads: set[Read] = set()
        generator = torch.Generator().manual_seed(seed)
        self._windows = Windows(device, generator, scale if scale is not None else _scale(module))
        self._path_of: dict[int, str] = {}
        self._busy: set[int] = set()
        self._kept: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._sources: list[Any] = []
        self.module = self._copy(module, "")

    def _copy(self, module: nn.Module, path: str) -> nn.Module:
        if id(module) in self._busy:
            raise Rejection(f"module {path} contains itself", stage="record")
        self._busy.add(id(module))
        if path and any(getattr(module, h, None) for h in _HOOKS):
            raise Rejection(f"module {path} has hooks", stage="record")
        new: nn.Module = object.__new__(_watched(type(module), self, path))
        state = {k: type(v)(v) if type(v) in _CONTAINERS else v for k, v in module.__dict__.items()}
        for kind in ("_parameters", "_buffers"):
            state[kind] = {k: None if v is None else self._tensor(v, _join(path, k)) for k, v in module.__dict__[kind].items()}
        state["_modules"] = {k: None if v is None else self._copy(v, _join(path, k)) for k, v in module.__dict__["_modules"].items()}
        for h in _HOOKS:
            state[h] = type(state[h])()
        for k, v in state.items():
            if isinstance(v, Tensor):
                state[k] = self._tensor(v, _join(path, k))
        new.__dict__.update(state)
        self._busy.discard(id(module))
        self._kept.append((path, new.__dict__, _shallow(state)))
        return new

    def _tensor(self, t: Tensor, path: str) -> Tensor:
        if id(t) in self._path_of:  # the experts of another module need not share theirs
            raise Rejection(f"{path} and {self._path_of[id(t)]} are one tensor", stage="record")
        if not isinstance(t, nn.Buffer) and type(t) not in (Tensor, nn.Parameter):
            raise Rejection(f"{path} is a {type(t).__name__}, no plain tensor", stage="record")
        if t.layout is not torch.strided:
            raise Rejection(f"{path} is not strided", stage="record")
        weight = t.dtype is torch.int8 and t.ndim > 1
        new = self._float(t) if t.is_floating_point() else self._bytes(t) if weight else self._table(t, path)
        if isinstance(t, nn.Parameter):
            new = nn.Parameter(new, requires_grad=False)
        self._path_of[id(t)], self.tensors[path] = path, new
        self._sources.append(t)  # an id stays one object's as long as that lives
        return new

    def _float(self, t: Tensor) -> Tensor:
        if t.dtype not in _FLOATS:
            raise Rejection(f"parameters of type {t.dtype}", stage="record")
        return self._windows.take(tuple(t.shape), self.dtype or t.dtype)

    def _bytes(self, t: Tensor) -> Tensor:
        return self._windows.take(tuple(t.shape), t.dtype)

    def _table(self, t: Tensor, path: str) -> Tensor:
        if t.is_meta or isinstance(t, torch._subclasses.FakeTensor) or t.numel() > _TABLE:
            raise Rejection(f"the values of {path} cannot be copied", stage="record")
        return t.detach().to(self.device, copy=True)

    def check_unchanged(self) -> None:
        """Raise `Rejection` if the code wrote to an attribute, a list, a dict or a set of the copy."""
        for path, now, before in self._kept:
            if _changed(now, before):
                raise Rejection(f"it writes to the state of its module{' ' + path if path else ''}", stage="record")

    def reading(self) -> set[Read]:
        """Start a new log of attribute reads and return it; it fills as the code runs."""
        self.reads = set()
        return self.reads


def _scale(module: nn.Module) -> float:
    """So that products over the usual inner dim stay of order one."""
    weights = [*module.parameters(), *(b for b in module.buffers() if b.dtype is torch.int8)]
    dims = sorted(min(p.shape[-2:]) for p in weights if p.ndim >= 2 and p.numel())
    return 1.5 / math.sqrt(dims[len(dims) // 2]) if dims else 0.2


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shallow(state: dict[str, Any]) -> dict[str, Any]:
    return {k: type(v)(v) if type(v) in _CONTAINERS else v for k, v in state.items()}


def _changed(now: dict[str, Any], before: dict[str, Any]) -> bool:
    if now.keys() != before.keys():
        return True
    return any(not _same(now[k], before[k]) for k in now)


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[k] is b[k] for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return a == b if isinstance(a, set) else a is b


def _watched(cls: type, probe: Probe, path: str) -> type:
    """A subclass of a module class that notes which attributes the code asks for."""
    if "__init_subclass__" in {k for c in cls.__mro__ for k in c.__dict__ if c not in (object, nn.Module)}:
        raise Rejection(f"{cls.__name__} reacts to being subclassed", stage="record")

    def __getattribute__(self: Any, name: str) -> Any:
        if name not in _OWN and not (name.startswith("__") and name.endswith("__")):
            probe.reads.add((path, name))
        return cls.__getattribute__(self, name)  # type: ignore[call-arg]

    return type(cls)(
        cls.__name__, (cls,), {"__getattribute__": __getattribute__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    )


def candidates(module: nn.Module | None, weights: Callable[[], Iterator[Tensor]], limit: int = 12) -> list[int]:
    """Numbers that may be the number of experts, largest first: leading dims of weights, lengths of containers, attributes."""
    found = {w.shape[0] for w in weights() if w.ndim >= 2}
    for m in module.modules() if module is not None else ():
        if isinstance(m, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Sequential)):
            found.add(len(m))
    if module is not None:
        found.update(v for v in vars(module).values() if type(v) is int)
    return sorted((n for n in found if 1 <= n <= 4096), reverse=True)[:limit]
