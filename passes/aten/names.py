"""Names of ops: what kind each one is, in one table, and the one function that names a call.

A name stands without namespace, overload and the underscore of an in-place form: `aten::view`, `Tensor.view` and `torch.view` are one
row. A kind says which values an op reads where; who shares memory with whom is a question for `effects`. What an element of an op is
stands in `definitions_*`, where an op of a kind whose members all read alike (RESHAPE, SAME, CAST, LIKE, SPLIT) needs nothing but its row
here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Container
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from .node import example_value


def _row(names: str) -> frozenset[str]:
    return frozenset(names.split())


# ---- views, copies and casts -------------------------------------------------------------------------------------------

# the same elements, in the same row-major order, under another shape
RESHAPE = _row(
    "view reshape _unsafe_view flatten unflatten ravel view_as reshape_as squeeze unsqueeze view_copy squeeze_copy unsqueeze_copy"
)
# the same elements under other dims
PERMUTE = _row("permute transpose swapaxes swapdims t mT mH numpy_T T H matrix_H adjoint movedim moveaxis")
# the same elements at other places
MOVE = _row("flip fliplr flipud roll")
# some of the elements, at a place known when compiling
PART = _row("slice select narrow unbind")


def _after(sizes: Any, i: int) -> Any:
    """Where part i begins, of parts of one size or of a size each."""
    return sum(sizes[:i]) if isinstance(sizes, list) else i * sizes


def _bound(i: Any, n: Any) -> Any:
    """A bound of a part, as slicing takes it: from the end where it is negative, and never outside."""
    at = i + n if i < 0 else i
    return min(max(at, 0), n) if isinstance(at, int) and isinstance(n, int) else at


# several parts along a dim, and where part i of n elements begins: (arguments, i, n) -> start
SPLIT: dict[str, Callable[[Any, int, Any], Any]] = {
    "chunk": lambda a, i, n: i * -(-n // a.chunks),
    "split": lambda a, i, n: _after(getattr(a, "split_size", None) or a.split_sizes, i),
    "split_with_sizes": lambda a, i, n: _after(a.split_sizes, i),
    "tensor_split": lambda a, i, n: (
        _bound([0, *a.indices][i], n) if hasattr(a, "indices") else sum((n - j + a.sections - 1) // a.sections for j in range(i))
    ),
}
PART |= SPLIT.keys()
# each element once or more often
REPEAT = _row("expand expand_as broadcast_to repeat tile repeat_interleave")
# the same element at the same index, in the same dtype
SAME = _row("contiguous clone alias detach lift lift_fresh lift_fresh_copy positive data real _conj resolve_conj resolve_neg requires_grad")
# the same element at the same index, perhaps in another dtype
CAST = _row("to _to_copy type_as type float double half bfloat16 int long short bool")
VIEW = RESHAPE | PERMUTE | PART | REPEAT | SAME
# several tensors put together
JOIN = _row("cat concat concatenate stack vstack row_stack hstack column_stack dstack")
# ops at which a gradient ends
STOP_GRADIENT = _row("detach lift_fresh_copy")

# ---- made of no data ---------------------------------------------------------------------------------------------------

LIKE = _row("zeros_like ones_like full_like empty_like")  # of another tensor no more than the shape is read
ZEROS = _row("zeros zeros_like new_zeros zero")
ONES = _row("ones ones_like new_ones")
FULL = _row("full full_like new_full scalar_tensor fill")
EMPTY = _row("empty empty_like new_empty empty_strided new_empty_strided")
CREATION = ZEROS | ONES | FULL | EMPTY | _row("arange eye")
SIZE = _row("sym_size sym_numel sym_stride")  # a tensor's sizes as numbers
READ = _row("item _local_scalar_dense")  # an element as a number

# ---- sums, products, selections, writes ----------------------------------------------------------------------------------

CONTRACTION = _row("linear matmul mm bmm addmm baddbmm einsum mv embedding _grouped_mm grouped_mm grouped_mm_fallback")
REDUCTION = _row("sum mean")
PUT = _row("index_put _index_put_impl")
ACCUMULATE = PUT | _row("index_add scatter_add scatter_reduce")  # rows added (or put) at places read from data
COMBINE = ACCUMULATE | REDUCTION | (CONTRACTION - _row("linear mv embedding _grouped_mm grouped_mm grouped_mm_fallback")) | _row("add")
SELECTION = _row("topk sort argsort argmax max")  # the best by a score, and where they are
GROUPED = _row("_grouped_mm grouped_mm grouped_mm_fallback")
LOOKUP = _row("index embedding gather")  # rows at places read from data
ROUTED = SELECTION | GROUPED | _row("gumbel_softmax scaled_grouped_mm _scaled_grouped_mm")  # what a graph with experts holds one of
CLAMP = _row("clamp clip clamp_min clamp_max")

_PYTHON = {"truediv": "div", "itruediv": "div", "floordiv": "floor_divide", "mod": "remainder", "and_": "bitwise_and", "or_": "bitwise_or"}


@functools.cache
def _of_schema(name: str) -> str:
    """Without its namespace; somebody's own op that only shares its name with one of torch's keeps it, and is none that is known.

    Torch's are those of ATen, and what only a tensor or a module of torch's has, such as `float` and `one_hot`; `silu_` is `silu` there.
    """
    space, _, own = name.partition("::")
    plain = _plain(own)
    shared = plain == "getitem" or any(hasattr(room, x) for room in _TORCHS for x in {own, plain})
    return name if space not in ("aten", "prims") and shared else plain


_TORCHS = (torch.ops.aten, torch.Tensor, torch, F, torch.special)


def op_name(n: fx.Node) -> str:
    """What a node of either graph calls: a row's name, "getitem" for access to a tuple (or to a tensor, in Dynamo's), "" for nothing known.

    Arithmetic on numbers (sizes) has no name: it is no op on tensors.
    """
    if n.op == "call_method":
        return _plain(str(n.target))
    if n.op != "call_function":
        return ""
    if n.target is operator.getitem:
        return "getitem"
    schema = getattr(n.target, "_schema", None)
    if schema is not None:
        return _of_schema(str(schema.name))
    if isinstance(example_value(n), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
        return ""
    name = getattr(n.target, "__name__", "")
    name = name[1:] if getattr(n.target, "__module__", "") == "_operator" and name in _IN_PLACE else name
    return _PYTHON.get(name, _plain(name))


def through(n: Any, ops: Container[str]) -> Any:
    """What n is made of by way of these ops alone, each from its first argument; n itself where it is none of them."""
    while isinstance(n, fx.Node) and op_name(n) in ops and n.args and isinstance(n.args[0], fx.Node):
        n = n.args[0]
    return n


_IN_PLACE = _row("iadd isub imul ipow imatmul iand ior ixor ilshift irshift")


@functools.lru_cache(maxsize=4096)
def _plain(name: str) -> str:
    return name if name.startswith("__") else name.rstrip("_")
