"""FSDP2's all-gather straight into the fractal format, by its public extension (`fsdp_pre_all_gather`, `fsdp_post_all_gather`).

Every rank brings its own experts into the order of the format before they are gathered, an ordinary copy of 1/W of the weight: the
gathered bytes are then the whole stack in that format, and a tensor of the format is laid over them. Nothing is cast, copied or kept
beside what FSDP2 gathers anyway, and FSDP2 frees and refills that memory as it does for any parameter.
What torch_npu makes of it was tried on stubbed CANN libraries; no NPU has run it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from . import formats

log = logging.getLogger("moe_compile")
aten = torch.ops.aten
# what FSDP2 does to a parameter before it is a shard: the result is one that is gathered in the same way
_KEEPS = {
    aten.split.Tensor, aten.chunk.default, aten.clone.default, aten.new_zeros.default, aten.new_empty.default, aten.slice.Tensor,
    aten.view.default, aten.as_strided.default, aten._to_copy.default, aten._pin_memory.default, aten.detach.default,
    aten.empty_like.default, aten.narrow.default, aten.cat.default, aten.alias.default,
}  # fmt: skip


class FractalShard(torch.Tensor):
    """Expert weights [E, in, out], or some of the experts, that are gathered in the fractal format. Ordinary in every other way."""

    _t: Tensor

    @staticmethod
    def __new__(cls, t: Tensor) -> FractalShard:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, t.size(), strides=t.stride(), storage_offset=t.storage_offset(), dtype=t.dtype, device=t.device,
            requires_grad=t.requires_grad,
        )  # fmt: skip

    def __init__(self, t: Tensor) -> None:
        self._t = t

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"FractalShard({self._t})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_t"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> FractalShard:
        return FractalShard(inner["_t"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*pytree.tree_map_only(FractalShard, _inner, args), **pytree.tree_map_only(FractalShard, _inner, kwargs or {}))
        if func in _KEEPS:
            return pytree.tree_map_only(Tensor, FractalShard, out)
        written = args and isinstance(args[0], Tensor) and func._schema.is_mutable and func._schema.name.endswith("_")
        return args[0] if written else out

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], tuple[torch.Size, bool]]:
        """This rank's experts, in the order of the format where whole experts are sharded; else as they are."""
        t = self._t if mp_policy.param_dtype is None else self._t.to(mp_policy.param_dtype)
        nz = formats.has_formats(t) and formats.refuses_nz(outer_size, t.dtype) is None and _whole_experts(t, outer_size)
        piece = formats.in_blocks(t) if nz else t.contiguous()
        return (_padded(piece, outer_size, mesh.size()) if t.shape[1:] == outer_size[1:] else piece,), (outer_size, nz)

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: tuple[torch.Size, bool], param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The whole weight over the gathered memory, which FSDP2 frees and refills by itself."""
        (gathered,), (size, nz) = outputs, metadata
        flat = gathered.view(-1)
        if out is not None:
            if nz:  # refilled memory may lie elsewhere
                formats.point(out, flat)
            return None
        return (formats.over(flat, size) if nz else flat[: size.numel()].view(size)), ()


def _inner(t: FractalShard) -> Tensor:
    return t._t


def _whole_experts(t: Tensor, outer_size: torch.Size) -> bool:
    if t.shape[1:] == outer_size[1:]:
        return True
    told = "expert weights %s are not sharded along the experts: they are gathered as they are, not in the fractal format"
    log.warning(told, [*outer_size])
    return False


def _padded(t: Tensor, outer_size: torch.Size, ranks: int) -> Tensor:
    """As many experts as the rank that has most: all bring the same."""
    missing = -(-outer_size[0] // ranks) - t.shape[0]
    return t if missing <= 0 else torch.cat([t, t.new_zeros(missing, *t.shape[1:])])


def plain(t: Any) -> Any:
    """A parameter without what makes it gathered in this way, for a state_dict; a distributed tensor stays one."""
    if isinstance(t, FractalShard):
        return t._t
    local = getattr(t, "_local_tensor", None)
    if not isinstance(local, FractalShard):
        return t
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local._t, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())
