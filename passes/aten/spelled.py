"""Calls of Dynamo's graph that are two steps, of which a block needs the first: they are written out, as torch itself does them.

softmin(x) = softmax(-x), over dim 0 of a tensor of 0, 1 or 3 dimensions and dim 1 of others where no dim is given
"""

from __future__ import annotations

import torch
import torch.fx as fx
import torch.nn.functional as F


def spell(gm: fx.GraphModule) -> None:
    """Write out, in place, every such call whose arguments are plain; the numbers are the same to the last bit."""
    for n in [n for n in gm.graph.nodes if n.op == "call_function" and n.target is F.softmin]:
        given = dict(zip(("input", "dim", "_stacklevel", "dtype"), n.args, strict=False)) | n.kwargs
        x, value = given["input"], getattr(given["input"], "meta", {}).get("example_value")
        dim = given.get("dim")
        if not isinstance(value, torch.Tensor) or not isinstance(dim, int | None):
            continue
        dim = dim if dim is not None else int(value.ndim not in (0, 1, 3))
        with gm.graph.inserting_before(n):
            opposite = gm.graph.call_function(torch.neg, (x,))
            opposite.meta = dict(n.meta)
            opposite.meta["example_value"] = -value
            n.target, n.args = torch.softmax, (opposite, dim)
            n.kwargs = {"dtype": given["dtype"]} if given.get("dtype") is not None else {}
