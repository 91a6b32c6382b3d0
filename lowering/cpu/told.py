"""What the CPU target has to say about a compilation: kernels that could not be built, weights that are read from packed copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from ...ir import MoeBlock
from ...ops import layout_of
from . import build, experts, frozen, prebuilt

_EXPERTS_PLAIN = 8  # arguments of the op before the plain ones


def lacks(ir: MoeBlock, patience: float | None = None) -> tuple[str, str] | None:
    """What runs a block whose kernels could not be built, and why they could not; None where it has them, or is to have none.

    Waits for their build, `patience` seconds at most.
    """
    says = experts.says(ir)
    why = build.failure("forward", ir.experts.dtype, patience) if "kernel" in says else None
    return None if why is None else (says.replace("kernel", "torch"), f"fused, but in plain torch, at about half the speed: {why}")


def missing() -> str:
    """What keeps the kernels from being built on this machine; "" for nothing."""
    try:
        build._compiler()
    except RuntimeError as e:
        held = prebuilt.held()
        return f"{e}: ops run in the kernels of this package ({', '.join(held)})" if held else f"{e}: ops run in plain torch"
    return ""


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
