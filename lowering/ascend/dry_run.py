"""What would run on an NPU, shown on any machine: the lowered FX graph, and the GE nodes where torch_npu can be imported."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from ..target import Chosen
from . import modes, schemas
from .rewrite import Lowered


@dataclass(frozen=True)
class GeNode:
    """One node of a GE graph: its type, its name, what it reads ("node:output", ":-1" for a control edge), its attributes."""

    type: str
    name: str
    inputs: tuple[str, ...]
    attrs: dict[str, Any]

    def __str__(self) -> str:
        attrs = ", ".join(f"{k}={v}" for k, v in sorted(self.attrs.items()))
        return f"{self.name} = {self.type}({', '.join(i or '-' for i in self.inputs)})  {attrs}".rstrip()


@dataclass
class DryRun:
    """Everything that was lowered while it was open."""

    lowered: list[Lowered] = field(default_factory=list)
    ge: list[list[GeNode]] = field(default_factory=list)

    def fx_text(self) -> str:
        """The lowered graphs as Python."""
        return "\n".join(g.module.print_readable(print_output=False) for g in self.lowered)

    def calls_text(self) -> str:
        """Only the npu calls, with all arguments, a source line above each group."""
        return "\n\n".join(calls_text(g.module.graph) for g in self.lowered)

    def ge_text(self) -> str:
        return "\n\n".join("\n".join(map(str, nodes)) for nodes in self.ge)


@contextlib.contextmanager
def collect() -> Iterator[DryRun]:
    """Collect the graphs that are lowered in this block."""
    found = DryRun()
    modes.SINKS.append(found.lowered.append)
    try:
        yield found
    finally:
        modes.SINKS.remove(found.lowered.append)


def calls_text(graph: fx.Graph, blocks: int | None = None) -> str:
    """The npu calls of a lowered graph, in order; of the first `blocks` blocks only."""
    lines: list[str] = []
    shown = ""
    for n in graph.nodes:
        if not str(n.target).startswith("npu."):
            continue
        source = _source(n)
        if source and source != shown:
            lines.append(f"# {source}")
            shown = source
        lines.append(f"{n.name} = torch.ops.{n.target}({_arguments(n)})")
        combines = sum("finalize" in line or "token_unpermute" in line for line in lines)
        if blocks is not None and combines == blocks:
            break
    return "\n".join(lines)


def _arguments(n: fx.Node) -> str:
    return ", ".join([*(_value(a) for a in n.args), *(f"{k}={_value(v)}" for k, v in n.kwargs.items())])


def _value(v: Any) -> str:
    if isinstance(v, fx.Node):
        value = v.meta.get("example_value")
        shape = f":{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if hasattr(value, "shape") else ""
        return f"{_short(v.name)}{shape}"
    return f"[{', '.join(map(_value, v))}]" if isinstance(v, (list, tuple)) else repr(v)


def _short(name: str) -> str:
    """A weight by its path in the model, without the words that Dynamo puts around it."""
    return re.sub(r"(l_self)?_(modules|parameters|buffers)_+", ".", name).replace("packed_.", "packed ").strip("._")


def _source(n: fx.Node) -> str:
    """The line of the user's code that the call stands for."""
    lines = [line.strip() for line in (n.meta.get("stack_trace") or "").splitlines() if line.strip(" ^~")]
    return lines[-1] if lines else ""


# ---- GE ------------------------------------------------------------------------------------------------------------------


def ge_backend(options: Chosen, sink: Callable[[list[GeNode]], None]) -> Callable[..., Any]:
    """An inner compiler that hands every graph to torchair's FX to GE conversion, tells the nodes, and runs the graph op by op."""
    if not schemas.wheel():
        raise ImportError("the GE graph needs torch_npu: it cannot be imported on this machine (pip install torch-npu, and CANN)")
    import torchair
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def compile_one(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = torchair.get_compiler(modes.ge_config(options))(gm, example_inputs)
        sink(ge_nodes(compiled.runner.graph))
        return make_boxed_func(gm.forward)  # type: ignore[no-any-return]

    decompositions = torchair.get_npu_backend(compiler_config=modes.ge_config(options)).keywords.get("decompositions")
    backend = aot_autograd(fw_compiler=compile_one, inference_compiler=compile_one, decompositions=decompositions)

    def compile_all(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        # tensors are on the CPU here: its own attention kernels mean nothing to GE
        with sdpa_kernel(SDPBackend.MATH):
            return backend(gm, example_inputs)  # type: ignore[no-any-return]

    return compile_all


def ge_nodes(graph: Any) -> list[GeNode]:
    """The nodes of a GE graph (protobuf) as plain values; constants by their value where they are short."""
    return [GeNode(op.type, op.name, tuple(op.input), _attributes(op)) for op in graph.op]


def _attributes(op: Any) -> dict[str, Any]:
    return {k: v for k, a in sorted(op.attr.items()) if (v := _attribute(a)) is not None and _tells(k)}


def _tells(name: str) -> bool:
    return not name.startswith("_") or name in ("_user_stream_label", "_op_aicore_num", "_op_vectorcore_num")


def _attribute(a: Any) -> Any:
    kind = a.WhichOneof("value")
    if kind == "list":
        return list(a.list.i) or list(a.list.f) or list(a.list.b)
    if kind == "s":
        return a.s.decode(errors="replace")
    if kind == "f":
        return float(f"{a.f:.7g}")  # GE keeps fp32
    return getattr(a, kind) if kind in ("i", "b") else None
