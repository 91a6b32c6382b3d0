"""Tensors spread over several devices (DTensor) in Dynamo's graph: opaque regions of the shadow.

What computes on them is not traced: one line of the user's there is a collective and local operations that only DTensor knows. Where
plain tensors come out of such a region (`to_local()`, a custom function's results) each is a leaf of the shadow, with nothing before it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils._pytree import tree_any, tree_map_only

from ...calls import is_write
from ...ir import Rejection
from .names import op_name
from .node import example_value

# ops with collectives inside; rows_out, rows_back, rows_gathered, summed, summed_rows
OURS = ("moe_compile.whole", "moe_compile.rows_", "moe_compile.summed")


def leaf() -> None:
    """The target of a leaf's node in the shadow: a plain tensor that comes out of an opaque region."""


def sharded_class() -> Any:
    """DTensor; None where nobody has imported it, so that there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_sharded(value: Any) -> bool:
    """Whether a value is a DTensor, or holds one."""
    cls = sharded_class()
    return cls is not None and value is not None and tree_any(lambda v: isinstance(v, cls), value)


def is_collective(n: fx.Node) -> bool:
    """Whether other devices have a part in a value: even a selection's indices are other ones behind it."""
    return str(getattr(n.target, "namespace", "")).startswith("_c10d_functional") or op_name(n) == "wait_tensor"


def takes_part(n: fx.Node) -> bool:
    """Whether a node of Dynamo's graph sends something to other ranks: a collective, or an op of this package with one inside."""
    return "c10d" in str(n.target) or str(n.target).startswith(OURS)


def group_called(name: Any) -> Any:
    """The process group of a name; None for anything else."""
    if not isinstance(name, str):
        return None
    try:
        return torch._C._distributed_c10d._resolve_process_group(name)
    except (AttributeError, RuntimeError):
        return None


def is_region(n: fx.Node) -> bool:
    """Whether a node of Dynamo's graph computes on tensors that are spread over devices, or puts one together.

    Raises `Rejection` where it writes to one.
    """
    if n.op in ("placeholder", "output", "get_attr"):
        return False
    taken = [x for x in n.all_input_nodes if is_sharded(example_value(x))]
    if taken and is_write(n):
        raise Rejection("a tensor that is spread over several devices (DTensor) is written in place", n, "shadow", code="sharded")
    return bool(taken) or is_sharded(example_value(n)) or str(n.target).startswith(OURS)


def opened(value: Any) -> Any:
    """A node's value with a new tensor, traced by make_fx, for each plain one in it."""

    def new(v: Tensor) -> Tensor:
        if is_sharded(v):
            return v
        return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device, requires_grad=v.requires_grad)

    return tree_map_only(Tensor, new, value)


def as_leaf(made: fx.Node, of: Any) -> None:
    """What `opened` traced becomes a leaf in the memory of what it stands for."""
    made.target, made.args, made.kwargs = leaf, (), {}
    made.meta["example_value"] = of
