"""The fused ops ``torch.ops.moe_compile.route``, ``.experts`` and their kin: schema, shapes, gradients, autocast, dispatch.

Only tensors and plain numbers go in (the activation as a postfix program), so equal layers share compiled code.
Under autograd `experts` runs as `experts_fwd`, which also returns the pre-activations, and its gradient is the op
`experts_bwd`; `route` runs as `route_fwd`, its gradient is `route_bwd`. Compilers therefore see ops in both directions. What backward
needs of small tensors that a training step may write meanwhile (a selection bias, logits or weights that the caller was given) are copies
that the forward ops return. Gradients of gradients are those of plain torch (`lowering/reference/twice.py`).
`experts_shared` adds the shared expert's MLP, so that a device can run it beside the routed experts; it is for inference, and
where a gradient is asked for it runs as `experts` twice. `route_linear` is `route` of logits that are a linear map of the tokens, for
inference with few of them.
`experts_stored` is `experts` for weights that lie in memory as codes of few bits with scales (`ir.Stored`); where a gradient is asked for
it runs as `experts` on the weights as floats. Where rows are rounded before a product (`ir.Rows`) there is no gradient.
`experts_stored_shared` is `experts_shared` of such routed experts; the shared expert's weights are floats.
`experts_sorted` is `experts` of rows that stand in the order of their experts already, one expert a row; it is made of `experts`.
`experts_stored_adapted` is both, low-rank pairs beside weights in few bits; its gradient goes to the rows and the pairs.
A device without kernels of its own runs `moe_compile.lowering.reference`.
`experts_chained` runs experts that are a chain of products and maps of whole rows (`ir.Chain`); its gradient computes the rows again.
"""

from __future__ import annotations

from . import anywhere, autocast, autograd, shapes, sorted, sources
from .records import adapted_of, bundled, chained_of, experts_args, family_of, layout_of, route_args, routing_of, shared_args, storage_of
from .schemas import SCHEMAS, library, schema_of, straight_on_cuda

__all__ = [
    "SCHEMAS", "adapted_of", "anywhere", "autocast", "autograd", "bundled", "chained_of", "experts_args", "family_of", "layout_of",
    "library", "route_args", "routing_of", "schema_of", "shapes", "shared_args", "sorted", "sources", "storage_of", "straight_on_cuda",
]  # fmt: skip
