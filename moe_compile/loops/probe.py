"""A copy of the user's module to experiment on: same code, same attributes, random parameters, nothing shared that could change.

Reading a function needs E distinct experts, not E experts' memory: large parameters are `as_strided` windows over one random
buffer, shifted by 16 bytes per expert, so they cost about one expert's memory. Reads work in every op; a write raises.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..ir import Rejection
from ..passes.aten.sharded import is_sharded
from .fewer import Fewer
from .libraries import Forbidden, home, is_library, why_not
from .places import HOOKS, MODULE, Place
from .sealed import Sealed
from .sealed_code import MODULE_STATE

_WHOLE = (1 << 20, 1 << 26)  # elements up to which a parameter (3-D and more, 2-D) does not overlap itself
_PERIOD = (1 << 20) - 3  # a prime: rows of any usual length start at different places of the repeated block
_TABLE = 1 << 22  # elements: integer buffers are copied up to this size
_ALIGN = 16  # bytes
# Types of one byte whose tensors are weights or their scales where they have rows and columns
CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
WORDS = (torch.uint8, torch.int32)  # of packed codes, where each expert has rows and columns of them, or a tensor is too large for a table
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Sequential)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Windows:
    """Random tensors of given shapes as windows over one growing random buffer; entries are normal with deviation `scale`.

    Codes of one byte are small numbers of deviation 1, powers of two (e8m0) lie about 1.
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
            block = self._noise(min(size, _PERIOD), dtype).to(self.device, dtype)
            self.buffers[dtype] = block.repeat(-(-size // block.numel()))
        return self.buffers[dtype]

    def _noise(self, size: int, dtype: torch.dtype) -> Tensor:
        if dtype is torch.uint8:  # small powers of two, where they are exponents: no activation saturates
            return torch.randint(112, 123, (size,), generator=self.generator)
        if dtype is torch.int32:
            return torch.randint(-(1 << 31), 1 << 31, (size,), generator=self.generator)
        block = torch.randn(size, generator=self.generator) * (1 if dtype.itemsize == 1 else self.scale)
        if dtype is torch.float8_e8m0fnu:
            return torch.exp2(block.round())
        return block if dtype.is_floating_point else block.round()


class Probe(Sealed):
    """`module`: a sealed copy of the user's module, all the way down, with probes for parameters. The user's is only read.

    `tensors`: every parameter, buffer and plain tensor attribute of the copy, by path (each tensor once).
    `reads`: every place that the code read so far beside its arguments.
    Floats become `dtype` if one is given and they are no wider, and lists of them `biases` times as large as the others. Integer tables
    keep their values, but for matrices of bytes, which are weights (as floats of one byte are).
    Raises `Rejection` for what cannot be copied faithfully: hooks inside, shared or unusual tensors, tables without values.
    """

    def __init__(
        self,
        module: nn.Module | None,
        device: torch.device,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        scale: float | None = None,
        listening: bool = False,
        biases: float = 1.0,
        fewer: Fewer | None = None,
    ) -> None:
        super().__init__(listening, fewer)
        self.device, self.dtype, self.biases = device, dtype, biases
        self.tensors: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        self._windows = Windows(device, generator, scale if scale is not None else 0.2 if module is None else _scale(module))
        self._path_of: dict[int, str] = {}
        self._single: set[str] = set()  # paths of modules that are one expert's
        self.module = None
        if module is not None:
            if nn.modules.module._has_any_global_hook():
                raise Rejection("there are hooks for all modules", stage="hooks")
            parts = list(self._shells(module, ""))
            for original, new, path in parts:
                self._fill_module(original, new, path)
            self.module = self.seal(module, Place(MODULE))

    def _shells(self, module: nn.Module, path: str) -> Iterator[tuple[nn.Module, nn.Module, str]]:
        """An empty copy of each part first: what the parts hold may refer to any of them."""
        if id(module) in self.memo:
            known = self.places[id(self.memo[id(module)][1])][1]
            if next(module.parameters(), next(module.buffers(), None)) is not None or module._modules:
                raise Rejection(f"{path} and {known} are one module", stage="shared")
            return
        kinds = [h.strip("_").removesuffix("s").replace("_", " ") for h in HOOKS if path and getattr(module, h, None)]
        if kinds:
            raise Rejection(f"module {path} has hooks: a {' and a '.join(kinds)}, which would not run in the fused block", stage="hooks")
        cls, place = before_sharding(type(module)), _place(path)
        new_cls = self.code.watched(cls) if is_library(home(cls)) and not why_not(cls, "") else self.copy(cls, place.type())
        if type(new_cls) is Forbidden:
            raise Rejection(f"module {path} is a {cls.__name__}, which cannot be copied", stage="effects")
        new = object.__new__(new_cls)
        self.memo[id(module)], self.places[id(new)] = (module, new), (new, place)
        yield module, new, path
        for k, child in self.some(module._modules.items()):
            if path in self._single or self.fewer is not None and len(module._modules) in self.fewer.counts:
                self._single.add(_join(path, k))
            if child is not None:
                yield from self._shells(child, _join(path, k))

    def _fill_module(self, module: nn.Module, new: nn.Module, path: str) -> None:
        place, state = _place(path), dict(module.__dict__)
        for kind in ("_parameters", "_buffers"):
            state[kind] = {k: None if v is None else self._probe(v, _join(path, k)) for k, v in self.some(state[kind].items())}
        state["_modules"] = {k: None if v is None else self.memo[id(v)][1] for k, v in self.some(state["_modules"].items())}
        state |= {h: type(state[h])() for h in HOOKS}
        state["_compiled_call_impl"] = None  # `module.compile()`: the code that is read is what it compiles
        for k, v in state.items():
            if isinstance(v, Tensor):
                state[k] = self._probe(v, _join(path, k))
            elif k not in MODULE_STATE:
                state[k] = self.seal(v, place.attr(k))
        new.__dict__.update(state)
        for held in (new, new._parameters, new._buffers, new._modules):
            self.keep(place, held)

    def _probe(self, t: Tensor, path: str) -> Tensor:
        if id(t) in self._path_of:  # the experts of another module need not share theirs
            raise Rejection(f"{path} and {self._path_of[id(t)]} are one tensor", stage="shared")
        t, whole = own_part(t), t
        self.sharded = path if t is not whole else self.sharded
        if not isinstance(t, nn.Buffer) and type(t) not in (Tensor, nn.Parameter):
            raise Rejection(f"{path} is a {type(t).__name__}, no plain tensor", stage="tensors")
        if t.layout is not torch.strided:
            raise Rejection(f"{path} is not strided", stage="tensors")
        single = path.rpartition(".")[0] in self._single
        shape = tuple(t.shape) if self.fewer is None else self.fewer.shape(t.shape, single)
        weight = t.dtype in CODES and t.ndim > 1 or t.dtype in WORDS and (t.ndim > 2 or t.ndim == 2 and t.numel() > _TABLE)
        if t.is_floating_point() and not weight:
            new = self._float(t, shape)
        else:
            new = self._windows.take(shape, t.dtype) if weight else self._table(t, path, shape)
        if isinstance(whole, nn.Parameter):
            new = nn.Parameter(new, requires_grad=False)
        self._path_of[id(whole)], self.tensors[path] = path, new
        self.memo[id(whole)] = whole, new
        return new

    def _float(self, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        if t.dtype not in _FLOATS:
            raise Rejection(f"parameters of type {t.dtype}", stage="tensors")
        new = self._windows.take(shape, wider(t.dtype, self.dtype))
        return new if t.ndim > 1 else new * self.biases

    def _table(self, t: Tensor, path: str, shape: tuple[int, ...]) -> Tensor:
        if t.is_meta or isinstance(t, torch._subclasses.FakeTensor) or t.numel() > _TABLE:
            raise Rejection(f"the values of {path} cannot be copied", stage="tensors")
        cut = t.detach()[tuple(slice(n) for n in shape)].to(self.device, copy=True)
        return cut if self.fewer is None else self.fewer.table(cut, t)


def wider(own: torch.dtype, least: torch.dtype | None) -> torch.dtype:
    """The type of a probe: `least` where a tensor's own is no wider, for code that casts to the types of its tensors."""
    return own if least is None or own.itemsize > least.itemsize else least


WHOLE = "moe_compile_whole"  # set on parameters that are read as a whole


def before_sharding(cls: type) -> type:
    """The class of a module before `fully_shard` put one of its own in front, whose hooks run around `forward`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    first, *rest = cls.__bases__
    return rest[0] if fsdp is not None and first is getattr(fsdp, "FSDPModule", None) and rest else cls


def own_part(t: Tensor) -> Tensor:
    """What code sees in place of a tensor that is spread over several devices (DTensor): this device's part, as code that runs on
    `to_local()` of its parameters, or all of it without its values where `moe_compile.parallelize` puts it together."""
    if not is_sharded(t):
        return t
    if getattr(t, WHOLE, False):
        return torch.empty(t.shape, dtype=t.dtype, device="meta")
    local: Tensor = t.to_local()  # type: ignore[attr-defined]
    return local


def _place(path: str) -> Place:
    return Place(MODULE, tuple(("attr", name) for name in path.split(".")) if path else ())


def _scale(module: nn.Module) -> float:
    """So that products over the usual inner dim stay of order one."""
    weights = [*module.parameters(), *(b for b in module.buffers() if b.dtype in CODES)]
    dims = sorted(min(p.shape[-2:]) for p in weights if p.ndim >= 2 and p.numel())
    return 1.5 / math.sqrt(dims[len(dims) // 2]) if dims else 0.2


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def candidates(module: nn.Module | None, weights: Callable[[], Iterator[Tensor]], limit: int = 12) -> list[int]:
    """Numbers that may be the number of experts, largest first: leading dims of weights, lengths of containers, attributes."""
    found = {w.shape[0] for w in weights() if w.ndim >= 2}
    for m in module.modules() if module is not None else ():
        if isinstance(m, CONTAINERS):
            found.add(len(m))
            stacks = next((list(child.parameters(recurse=False)) for child in m.children()), [])
            found.update(len(m) * p.shape[0] for p in stacks if p.ndim > 2)
    if module is not None:
        found.update(v for v in vars(module).values() if type(v) is int)
    return sorted((n for n in found if 1 <= n <= 4096), reverse=True)[:limit]
