"""Expert weights in the layout that npu_grouped_matmul wants, [E, in, out] in one block of memory: made once, never on a step.

A weight whose memory already lies that way (see `prepare`) is used through a view. Any other is copied on first use, and again when it was
written to since.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from . import quant

log = logging.getLogger("moe_compile")
_VIEWS = ("view", "reshape", "to", "detach", "flatten", "unflatten", "contiguous", "float", "bfloat16", "half")


@dataclass(frozen=True)
class Source:
    """A graph input and the views and casts that the graph puts on it before the experts see it."""

    position: int
    chain: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def value(self, t: Tensor) -> Tensor:
        for name, args in self.chain:
            t = getattr(t, name)(*args)
        return t


@dataclass(frozen=True)
class Recipe:
    """How one packed operand is made: the first `experts` of a stacked tensor, or one of many; transposed or not, cast or not.

    part: "int8" for the quantised weight, "scale" for its scales in `dtype`, "" for the weight itself, "stored" for one that is
    stored in int8 and multiplied by rows of floats. "channel": scales of `width` channels that the model has, `sources` [E, width] or
    [E, 1]; "zeros" and "ones": so many for each of `experts`.
    """

    sources: tuple[Source, ...]
    experts: int
    stacked: bool
    transposed: bool
    dtype: torch.dtype
    part: str = ""
    width: int = 0

    def view(self, tensors: Sequence[Tensor], differentiable: bool = False) -> Tensor:
        """The operand's value in the wanted orientation and dtype; free where no stacking and no cast is needed."""
        if self.part in ("zeros", "ones"):
            fill = torch.zeros if self.part == "zeros" else torch.ones
            return fill(self.experts, self.width, dtype=self.dtype, device=tensors[0].device)
        parts = [s.value(t) for s, t in zip(self.sources, tensors)]
        t = parts[0] if self.stacked else torch.stack(parts) if differentiable else _together(parts)
        t = t if t.shape[0] == self.experts else t[: self.experts]
        if self.transposed:
            t = t.transpose(-1, -2)
        if self.part == "channel":
            return t.expand(self.experts, self.width).to(self.dtype)
        if self.part in ("int8", "scale"):
            scale = quant.channel_scale(t).to(self.dtype)
            return scale if self.part == "scale" else quant.to_int8(t, scale)
        return t if t.dtype == self.dtype else t.to(self.dtype)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.view(tensors).contiguous()

    def is_free(self, tensors: Sequence[Tensor]) -> bool:
        """Whether packing copies nothing."""
        first = tensors[0]
        if self.part not in ("", "stored"):
            return False
        if not isinstance(first, torch._subclasses.FakeTensor):
            return self.view(tensors).is_contiguous() and _shares(self.view(tensors), first)
        return self.stacked and not any(name in ("to", "float", "half", "bfloat16") for name, _ in self.sources[0].chain) and (
            first.dtype == self.dtype and self.view(tensors).is_contiguous()
        )


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _together(parts: Sequence[Tensor]) -> Tensor:
    """A list as one stacked tensor: a view when the parts lie one behind the other, else a copy."""
    first = parts[0]
    step = first.numel()
    follows = all(
        _shares(p, first) and p.stride() == first.stride() and p.storage_offset() == first.storage_offset() + i * step
        for i, p in enumerate(parts)
    ) if not isinstance(first, torch._subclasses.FakeTensor) else False  # fmt: skip
    return first.as_strided((len(parts), *first.shape), (step, *first.stride())) if follows else torch.stack(list(parts))


def trace_back(n: fx.Node, placeholders: dict[fx.Node, int]) -> Source | None:
    """The graph input that a node is a view or cast of, or None."""
    chain: list[tuple[str, tuple[Any, ...]]] = []
    while n not in placeholders:
        if n.op != "call_method" or n.target not in _VIEWS or n.kwargs or not isinstance(n.args[0], fx.Node):
            return None
        if any(isinstance(a, fx.Node) for a in n.args[1:]):
            return None
        chain.append((str(n.target), tuple(n.args[1:])))
        n = n.args[0]
    return Source(placeholders[n], tuple(reversed(chain)))


# ---- the fractal format ------------------------------------------------------------------------------------------------

FRACTAL_NZ = 29  # ACL's number of the format
_NZ_DTYPES = (torch.float16, torch.bfloat16, torch.int8)


def as_is(t: Tensor) -> Tensor:
    return t


def to_nz(t: Tensor) -> Tensor:
    """A packed 3-D weight in FRACTAL_NZ, where npu_grouped_matmul takes it; biases and scales stay as they are.

    There is no shape function for the cast, so it cannot be part of a graph: it happens here, once.
    """
    if t.ndim != 3 or t.dtype not in _NZ_DTYPES or t.device.type != "npu":
        return t
    return _format_cast(t)


def _format_cast(t: Tensor) -> Tensor:
    import torch_npu

    torch_npu.npu.config.allow_internal_format = True  # without it the cast does nothing but warn
    out: Tensor = torch_npu.npu_format_cast(t.contiguous(), FRACTAL_NZ)
    return out


# ---- what is packed, kept for all graphs -------------------------------------------------------------------------------


@dataclass
class _Kept:
    sources: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    packed: Tensor

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        return all(r() is t for r, t in zip(self.sources, tensors)) and self.versions == _versions(tensors)


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """What changes when a weight is written to, or gets other memory."""
    return tuple(v for t in tensors for v in (0 if t.is_inference() else t._version, t.data_ptr()))


class Store:
    """Packed copies by the tensors they were made of, shared by every compiled graph; they go when the weights go."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kept: dict[tuple[Any, ...], _Kept] = {}
        self.copied = 0  # bytes of the copies that are alive

    def get(self, recipe: Recipe, tensors: Sequence[Tensor], finish: Callable[[Tensor], Tensor] = as_is) -> Tensor:
        """The packed operand made of `tensors`; `finish` brings it into its format."""
        chains = (s.chain for s in recipe.sources)
        plain = (recipe.experts, recipe.stacked, recipe.transposed, recipe.dtype, recipe.part, recipe.width)
        finish = as_is if recipe.part == "stored" else finish  # int8 under rows of floats is not known to be taken in a fractal format
        key = (*plain, finish, *chains, *map(id, tensors))
        found = self.kept.get(key)
        if found is not None and found.holds(tensors):
            return found.packed
        with self.lock:
            return self._make(key, recipe, tensors, finish)

    def _make(self, key: tuple[Any, ...], recipe: Recipe, tensors: Sequence[Tensor], finish: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            plain = recipe.pack(tensors)
            packed = finish(plain)
            free = recipe.is_free(tensors) and packed is plain
        # graph modes treat parameters as fixed addresses
        packed = nn.Parameter(packed.detach(), requires_grad=False) if packed.is_floating_point() else packed
        if not free and key not in self.kept:
            size = packed.numel() * packed.element_size()
            self.copied += size
            log.info("an expert weight was copied into the layout of grouped matmul: %.1f MiB", size / 2**20)
            weakref.finalize(tensors[0], self._drop, key, size)
        elif free and key not in self.kept:
            weakref.finalize(tensors[0], self._drop, key, 0)
        self.kept[key] = _Kept(tuple(map(weakref.ref, tensors)), _versions(tensors), packed)
        return packed

    def _drop(self, key: tuple[Any, ...], size: int) -> None:
        if self.kept.pop(key, None) is not None:
            self.copied -= size


STORE = Store()


# ---- ahead of time -----------------------------------------------------------------------------------------------------


def prepare(model: nn.Module) -> dict[str, int]:
    """Rearrange the memory of the expert weights of `model` in place, so that compiled graphs use them without a copy.

    Shapes, names and values stay as they are, so a state_dict loads and saves as before: a parameter [E, out, in] becomes a view, with
    other strides, of memory that lies as [E, in, out]; matrices of a list of experts come to lie one behind the other. Weights in int8
    may be buffers. One weight at a time is copied. Returns {name: bytes} of what was rearranged. Which weights are experts' is guessed
    from shapes: a wrong guess costs nothing but the copy on first use that there would have been without this call.
    """
    moved: dict[str, int] = {}
    for prefix, module in model.named_modules():
        for name, p in _out_in_parameters(module).items():
            p.data = _transposed_memory(p.data)
            moved[f"{prefix}.{name}" if prefix else name] = p.numel() * p.element_size()
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList)):
            for name, parameters in _equal_parameters(module).items():
                _lay_together(parameters)
                moved[f"{prefix}.*.{name}" if name else f"{prefix}.*"] = sum(p.numel() * p.element_size() for p in parameters)
    return moved


def _out_in_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Of a module's own stacked weights [E, a, b], those that are stored [out, in].

    A down projection [E, H, I] stands beside an up projection [E, I or 2 I, H]; stored the other way round they are [E, I, H] and
    [E, H, I or 2 I]. Where shapes allow both, nothing is said.
    """
    own = [*module.named_parameters(recurse=False), *((n, b) for n, b in module.named_buffers(recurse=False) if b.dtype == torch.int8)]
    stacked = {n: p for n, p in own if p.ndim == 3 and (p.is_floating_point() or p.dtype == torch.int8) and p.shape[0] > 1}
    found: dict[str, Tensor] = {}
    for (a, up), (b, down) in itertools.permutations(stacked.items(), 2):
        (e, m, n), (e2, k, i) = up.shape, down.shape
        if e != e2 or up.dtype != down.dtype:
            continue
        out_in = n == k and m in (i, 2 * i)
        in_out = m == i and n in (k, 2 * k)
        if out_in and not in_out:
            found.update({a: up, b: down})
    return found


def _transposed_memory(t: Tensor) -> Tensor:
    """The same tensor over memory in which its last two dims are swapped."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def _equal_parameters(experts: nn.Module) -> dict[str, list[Tensor]]:
    """Matrices (and vectors) that every member of a list has, with equal shapes and dtypes, by name."""
    members: list[dict[str, Tensor]]
    if isinstance(experts, nn.ParameterList):
        members = [{"": p} for p in experts.parameters(recurse=False)]
    else:
        members = [_weights(m) for m in experts.children()]
    if len(members) < 2 or any(m.keys() != members[0].keys() for m in members):
        return {}
    columns = {name: [m[name] for m in members] for name in members[0]}
    return {n: ps for n, ps in columns.items() if 1 <= ps[0].ndim <= 2 and _alike(ps) and _looks_like_experts(members[0])}


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters; buffers too where some are matrices of bytes."""
    buffers = dict(module.named_buffers())
    bytes_ = any(b.dtype == torch.int8 and b.ndim == 2 for b in buffers.values())
    return {**dict(module.named_parameters()), **(buffers if bytes_ else {})}


def _looks_like_experts(member: dict[str, Tensor]) -> bool:
    """An MLP: two or three matrices that fit each other, with or without biases. Whole decoder layers are not rearranged."""
    matrices = [p for p in member.values() if p.ndim == 2 and min(p.shape) > 1]
    return len(matrices) in (1, 2, 3) and all(p.ndim <= 2 for p in member.values()) and len(member) <= 6


def _alike(ps: Sequence[Tensor]) -> bool:
    first = ps[0]
    alike = all(p.shape == first.shape and p.dtype == first.dtype and p.device == first.device for p in ps)
    return alike and len(set(map(id, ps))) == len(ps)


def _lay_together(ps: Sequence[Tensor]) -> None:
    """Give all of a list's matrices one block of memory, each [out, in] over [in, out]."""
    first = ps[0]
    block = torch.empty(len(ps), *reversed(first.shape), dtype=first.dtype, device=first.device)
    for i, p in enumerate(ps):
        mine = block[i].t() if first.ndim == 2 else block[i]
        mine.copy_(p.data)
        p.data = mine
