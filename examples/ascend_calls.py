"""What an NPU would run of a compiled model, shown without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from rich.console import Console
from transformers import AfmoeForCausalLM


@contextlib.contextmanager
def lowered_calls(out: Console, dry_run: bool) -> Iterator[None]:
    """Print the npu calls of the first MoE layer of what is compiled inside, on a dry run."""
    if not dry_run:
        yield
        return
    from moe_compile.lowering.ascend import dry_run as calls

    with calls.collect() as found:
        yield
    for graph in found.lowered[:1]:
        out.print("npu calls of one MoE layer:\n\n" + calls.calls_text(graph.module.graph, blocks=1) + "\n", markup=False, soft_wrap=True)


def show_ge(out: Console, model: AfmoeForCausalLM) -> None:
    """The GE nodes of one MoE layer, where torch_npu can be imported."""
    from moe_compile.lowering.ascend import dry_run, schemas
    from moe_compile.options import Options

    if not schemas.wheel():
        out.print("GE nodes: torch_npu cannot be imported here, so there are none to show.")
        return
    layer = next(layer.mlp for layer in model.model.layers if layer.moe_enabled)
    weight = model.lm_head.weight
    found: list[list[dry_run.GeNode]] = []
    inner = dry_run.ge_backend(Options(target="ascend"), found.append)
    with torch.no_grad():
        x = torch.zeros(1, 8, weight.shape[1], dtype=weight.dtype)
        torch.compile(layer, backend="moe_fused", options={"target": "ascend", "inner": inner})(x)
    nodes = [str(n) for n in found[0] if n.type not in ("Const", "Fill", "Cast", "Data")]
    out.print("GE nodes of one MoE layer:\n\n" + "\n".join(nodes) + "\n", markup=False, soft_wrap=True)
