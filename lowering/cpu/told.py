"""What the CPU target says: what runs a block, kernels that could not be built, weights that are read from packed copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...ir import MoeBlock
from ...ir.text import rows_text, stored_text
from ...ops import layout_of
from . import build, coded, experts, frozen, prebuilt

_EXPERTS_PLAIN = 8  # arguments of the op before the plain ones


def says(ir: MoeBlock) -> str:
    """What runs the block, a kernel or plain torch, on which weights, and the dtype of its products."""
    e, dtype = ir.experts, str(ir.experts.dtype).removeprefix("torch.")
    kernel = experts.has_kernel(e)
    if e.coded:
        stored = ", ".join(dict.fromkeys(stored_text(s) for s in (e.up_stored, e.down_stored) if s is not None))
        both = ((e.up_stored, e.up_transposed), (e.down_stored, e.down_transposed))
        if kernel and not all(how is not None and coded.takes(how, transposed) for how, transposed in both):
            return f"cpu kernel ({dtype}, floats made in torch of {stored}, in turns)"
        rows = f", {rows_text(e.down_rows or e.up_rows)}" if e.rounded else ""
        return f"cpu {'kernel' if kernel else 'torch'} ({dtype}, weights {stored}{', low-rank pairs' if e.adapted else ''}{rows})"
    more = ", low-rank pairs" if e.adapted else ", maps of whole rows" if e.chain is not None else ""
    return f"cpu {'kernel' if kernel else 'torch'} ({dtype}{more})"


def decodes(ir: MoeBlock) -> str:
    """Why one expert in few bits that all tokens use is left to Inductor, "" where the kernels read its codes."""
    e = ir.experts
    if e.rounded:
        return "rows that are rounded run in plain torch on the CPU"
    both = ((e.up_stored, e.up_transposed), (e.down_stored, e.down_transposed))
    if not experts.has_kernel(e) or not all(how is not None and coded.takes(how, transposed) for how, transposed in both):
        return "the CPU's kernels do not decode such weights"
    return ""


def lacks(ir: MoeBlock, patience: float | None = None) -> tuple[str, str] | None:
    """What runs a block whose kernels could not be built, and why they could not; None where it has them, or is to have none.

    Waits for their build, `patience` seconds at most.
    """
    told = says(ir)
    why = build.failure("forward", ir.experts.dtype, patience) if "kernel" in told else None
    return None if why is None else (told.replace("kernel", "torch"), f"fused, but in plain torch, at about half the speed: {why}")


def missing() -> str:
    """What keeps the kernels from being built on this machine; "" for nothing."""
    try:
        build._compiler()
    except RuntimeError as e:
        held = prebuilt.held()
        return f"{e}: ops run in the kernels of this package ({', '.join(held)})" if held else f"{e}: ops run in plain torch"
    return ""


def remarks(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[str]:
    """What else the report says of a graph with fused ops."""
    return [*packed(gm, inputs), *_cast(gm)]


def _cast(gm: fx.GraphModule) -> list[str]:
    """A remark on experts whose weights are narrower than their tokens."""
    found = [(_value(n.args[0]), _value(n.args[3][0])) for n in gm.graph.nodes if n.target is torch.ops.moe_compile.experts.default]
    mixed = [(x.dtype, w.dtype) for x, w in found if x is not None and w is not None and x.dtype.itemsize > w.dtype.itemsize]
    if not mixed:
        return []
    wide, narrow = (str(d).removeprefix("torch.") for d in mixed[0])
    blocks = f"{len(mixed)} block{'' if len(mixed) == 1 else 's'}"
    how = "experts that are hit are cast one by one, in plain torch and not in the kernel named above"
    return [f"{blocks} with weights in {narrow} that your code makes {wide}: {how}"]


def packed(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[str]:
    """A remark on packed weights, if the graph's experts read weights that `moe_compile.prepare` froze; bytes are exact."""
    if not frozen.any_frozen():
        return []
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and "moe_compile.experts" in str(n.target)]
    sizes = [size for n in nodes if (size := _packed_bytes(n, _memory(gm, inputs))) is not None]
    if not sizes:
        return []
    blocks = f"{len(sizes)} block{'' if len(sizes) == 1 else 's'}"
    return [f"{blocks} read packed expert weights at inference: {sum(sizes):,} bytes beside the model's own (moe_compile.prepare)"]


def _memory(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[int, Tensor]:
    """The tensors that the graph is given, by the address of the memory that stands for theirs in its nodes."""
    given = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs, strict=False))
    for n in gm.graph.nodes:
        if n.op == "get_attr":
            owner, _, name = str(n.target).rpartition(".")
            given[n] = getattr(gm.get_submodule(owner), name, None)
    return {_address(v): t for n, t in given.items() if isinstance(t, Tensor) and (v := _value(n)) is not None}


def _packed_bytes(node: fx.Node, memory: dict[int, Tensor]) -> int | None:
    """Bytes of the packed copies that an experts op will read; None where it reads the weights themselves."""
    args = node.args
    lists = [list(_nodes(a)) for a in args[3:5]]
    values = [[_value(n) for n in ts] for ts in lists]
    own = [[None if v is None else memory.get(_address(v)) for v in vs] for vs in values]
    if any(t is None for ts in own for t in ts) or frozen.sources(*own) is None:  # type: ignore[arg-type]
        return None
    x, down = _value(args[0]), [v for v in values[1] if v is not None]
    plain_args: Any = args[_EXPERTS_PLAIN : _EXPERTS_PLAIN + 9]
    return None if x is None else frozen.packed_bytes(layout_of(plain_args), int(x.shape[-1]), down)


def _nodes(a: Any) -> Iterable[Any]:
    return a if isinstance(a, (list, tuple)) else ()


def _value(n: Any) -> Tensor | None:
    value = n.meta.get("example_value") if isinstance(n, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _address(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)
