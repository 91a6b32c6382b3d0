"""What stands between a selection and the sum of its experts that experts are not read through, in the words of a model's author.

Looked for only where a block is left as written, to say why: a norm, dropout, a maximum in place of the sum, an operation without a rule.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator

import torch
import torch.fx as fx

from ...ir import Rejection
from .. import terms as T
from ..aten import names
from ..aten.definitions_views import TUPLES
from ..aten.element import RULES, call_args, shape_of
from ..aten.names import op_name
from ..aten.sharded import is_collective
from ..aten.sources import code_of
from .counted import indices
from .fused import is_fused
from .match import ExpertsMatch
from .rows import MIXED
from .successive import successive

INSIDE = "inside the expert"
_NORMS = frozenset("group_norm native_group_norm batch_norm native_batch_norm instance_norm".split())  # over more than a row's features
_FEATURES = {
    "softmax": "a softmax over features",
    "_softmax": "a softmax over features",
    "log_softmax": "a softmax over features",
    "_log_softmax": "a softmax over features",
    "cumsum": "a running sum",
    "topk": "a top-k over features",
    "sort": "a sort of features",
    "scaled_dot_product_attention": "attention",
}
# What may stand in place of the sum over experts
COMBINED = {"amax": "maximum", "max": "maximum", "amin": "minimum", "min": "minimum", "prod": "product", "median": "median"}
# and what may join one expert's output with the others', one after another
_ONTO = {"mul": "product", "div": "quotient", "maximum": "maximum", "minimum": "minimum"}
_RANDOM = frozenset("rand_like randn_like bernoulli rand randn normal normal_functional uniform multinomial".split())
_MOST = 4_000
_NEAR = 24  # operations that an expert has


def between(choice: fx.Node, walls: set[fx.Node], only: Container[str] | None = None) -> Rejection | None:
    """The first such operation after a selection, in graph order; None if there is none. `only`: the names that are looked for."""
    for n in _rows_of_experts(choice, walls):
        if (only is None or op_name(n) in only) and (what := _odd(n, walls)) is not None:
            torchs = n not in walls and is_collective(n)  # in a namespace of its own, as custom ops are
            opaque = n in walls or _is_custom(n)
            return Rejection(what, n, "experts", code="elsewhere" if torchs else "opaque" if opaque else "inside")
    return None


def mixing(choice: fx.Node) -> fx.Node | None:
    """The first operation after a selection that makes one row of the rows [n, features] of an expert."""
    reductions = (n for n in _rows_of_experts(choice, set()) if op_name(n) in names.REDUCTION | {"mean", "norm", "linalg_vector_norm"})
    return next((n for n in reductions if len(shape_of(n.args[0])) == 2 and not _over_features(n)), None)  # type: ignore[arg-type]


def _is_gathered_up(n: fx.Node, rows: Collection[fx.Node]) -> bool:
    """Whether n is ``out * y0 * y1 ...`` from a tensor of ones (or other numbers) on; an expert's own products begin with its rows."""
    chain = [n]
    while isinstance(before := chain[-1].args[0], fx.Node) and op_name(before) == op_name(n):
        chain.append(before)
    starts = isinstance(before, fx.Node) and op_name(before) in names.CREATION
    return starts and len(chain) > 1 and all(x.args[1] in rows for x in chain)


def combined_otherwise(choice: fx.Node, walls: set[fx.Node]) -> Rejection | None:
    """What is told of a selection whose experts are applied in this graph, and whose results reach its end in another way than a sum of
    a token's experts: ``out[t] = out[t] * y``. None where no expert is applied: then the indices, or rows picked by them, leave the graph.
    """
    rows = dict.fromkeys(_rows_of_experts(choice, walls))
    if not any(op_name(n) in names.CONTRACTION or op_name(n) == "mul" and _weighs_product(n, rows) for n in rows):
        return None
    for n in rows:
        if op_name(n) in _ONTO and (_is_gathered_up(n, rows) or any(_put_back(n, u) for u in n.users)):
            why = f"the outputs of a token's experts are combined by their {_ONTO[op_name(n)]}, not by a weighted sum"
            return Rejection(why, n, "experts", code="inside")
    if (masked := next((n for n in rows if op_name(n) == "mul" and _is_block_mask(n)), None)) is not None:
        why = "the selection masks blocks of one product's features (MoEfication): all of them are computed, and one product takes them"
        return Rejection(why, masked, "experts", code="dense")
    why = "the selected indices reach experts in this graph, whose outputs were not read as a weighted sum over each token's experts"
    return Rejection(why, next(reversed(rows)), "experts", code="inside")


def _is_block_mask(n: fx.Node) -> bool:
    """Whether features [..., blocks, size] become one row [..., blocks * size], which a product takes."""
    *_, blocks, size = (1, 1, *shape_of(n))
    joined = [u for u in n.users if op_name(u) in names.RESHAPE and shape_of(u)[-1:] == (blocks * size,)]
    return any(op_name(v) in names.CONTRACTION for u in joined for v in u.users)


def _weighs_product(n: fx.Node, rows: Container[fx.Node]) -> bool:
    """Whether a number of the selection's weighs what an expert made of all tokens."""
    found = [x for x in n.all_input_nodes if x not in rows and len(shape_of(x)) > 1]
    for x in found:
        if op_name(x) in names.CONTRACTION:
            return True
        found.extend(y for y in x.all_input_nodes if y not in found and len(found) < _NEAR and y not in rows and _is_floats(y))
    return False


def _put_back(n: fx.Node, u: fx.Node) -> bool:
    """Whether u puts n at the rows of a tensor that n was made of: ``out[t] = out[t] * y``."""
    if op_name(u) in names.CAST:
        return any(_put_back(n, v) for v in u.users)
    if op_name(u) not in names.PUT:
        return False
    read = [x.args[0] if op_name(x) in names.CAST else x for x in n.all_input_nodes]
    same = (x for x in read if op_name(x) == "index" and x.args[0] is u.args[0])
    return any(list(call_args(x).indices) == list(call_args(u).indices) for x in same)


def explained(m: ExpertsMatch, walls: set[fx.Node], r: Rejection) -> Rejection:
    """A rejection that says where tensors could not be found or disagree, by what stands inside the experts, where that is the cause."""
    if r.stage not in ("region", "record", "rewrite", "recover", "validate"):
        return r
    for choice in {x.args[0]: None for x in T.walk(m.ids) if x.op == "topk"}:
        if (chain := successive(choice)) is not None:
            return chain
        if (odd := between(choice, walls)) is not None:
            return odd
    return r


def _rows_of_experts(choice: fx.Node, walls: set[fx.Node]) -> Iterator[fx.Node]:
    """Nodes made of a selection that hold rows of features, up to where they are added up over the experts."""
    scores = choice.args[0] if choice.args and isinstance(choice.args[0], fx.Node) else None
    experts = shape_of(scores)[-1] if scores is not None and shape_of(scores) else None
    reached = set(indices(choice)) | {choice}
    rows: set[fx.Node] = set()
    for n in choice.graph.nodes:
        made_of = [x for x in n.all_input_nodes if x in reached]
        if n in reached or not made_of or len(reached) > _MOST:
            continue
        reached.add(n)
        if _is_floats(n) and (any(x in rows for x in made_of) or _is_row(n, choice, experts)):
            yield n
            rows.add(n)
        if op_name(n) in names.ACCUMULATE or op_name(n) in names.REDUCTION and any(x in rows for x in made_of) and not _over_features(n):
            reached.discard(n)


def _is_row(n: fx.Node, choice: fx.Node, experts: object) -> bool:
    """Whether a node holds features of rows: no number for each slot or expert."""
    if not isinstance(n.meta.get("val"), torch.Tensor) or len(shape_of(n)) < 2 or op_name(n) in names.CREATION:
        return False
    slots = {shape_of(x)[-1] for x in indices(choice) if shape_of(x)}
    wider = experts is not None and len(shape_of(n)) > len(shape_of(choice.args[0]))  # type: ignore[arg-type]
    if wider and shape_of(n)[-2:] == (experts, experts):
        return True  # as many features for each expert as there are experts
    return shape_of(n)[-1] not in {1, experts, *slots}


def _is_floats(n: fx.Node) -> bool:
    """Whether a node gives floats: a tensor, or several of them."""
    v = n.meta.get("val")
    first = v[0] if isinstance(v, (tuple, list)) and v else v
    return isinstance(first, torch.Tensor) and first.dtype.is_floating_point


def _over_features(n: fx.Node) -> bool:
    a = call_args(n)
    dim = getattr(a, "dim", None)
    dims = [dim] if isinstance(dim, int) else list(dim or ())
    last = len(shape_of(n.args[0])) - 1  # type: ignore[arg-type]
    return bool(dims) and all(d in (-1, last) for d in dims)


def _odd(n: fx.Node, walls: set[fx.Node]) -> str | None:
    name = op_name(n)
    if n in walls:
        return f"a custom autograd.Function, a hook or a checkpoint of its own stands {INSIDE}: it cannot be looked through"
    if is_collective(n):
        return f"the selected rows go to other devices ({name}): they get their experts where they arrive, which is a block of its own"
    if is_fused(n):  # a loop that was read: what is amiss stands around it
        return None
    if name in _NORMS and getattr(call_args(n), "training", True):
        return f"{name} stands {INSIDE}: its statistics are not those of one row, as layer_norm's and rms_norm's are"
    if "dropout" in name and _active(n):
        return f"dropout is active {INSIDE}: in training mode it draws new numbers in each call"
    if name in _RANDOM:
        return f"random numbers are drawn {INSIDE}"
    if name in _FEATURES:
        return f"{_FEATURES[name]} stands {INSIDE}: activations must work on each number by itself"
    if name in COMBINED and _is_tensor_reduction(n) and not _over_features(n):  # of a row, such a number is a scale
        if len(shape_of(n.args[0])) == 2:  # type: ignore[arg-type]
            return MIXED
        return f"the outputs of a token's experts are combined by their {COMBINED[name]}, not by a weighted sum"
    if n.op == "call_function" and name and name not in RULES and name not in TUPLES and name not in names.SIZE and name != "getitem":
        return f"`{code_of(n) or name}` stands {INSIDE}: {_unknown(n, name)}"
    return None


def _unknown(n: fx.Node, name: str) -> str:
    """Why experts are not read through an operation that is not known."""
    if name in _NORMS:
        return f"{name} is not read, nor in evaluation, where its statistics are constants: fold them into the weights around it"
    if isinstance(n.target, torch._ops.OpOverload) and n.target.namespace != "aten":
        return f"what a custom op ({n.target._schema.name}) computes is told by nothing but its name"
    if len(n.all_input_nodes) == 1 and torch.Tag.pointwise in getattr(n.target, "tags", ()):
        return f"{name} is no activation that fused experts have: SiLU, GELU, ReLU and what exp, tanh, sigmoid and clamp make are"
    return f"{name} is no operation that experts are read through"


def _is_custom(n: fx.Node) -> bool:
    return (
        isinstance(n.target, torch._ops.OpOverload)
        and n.target.namespace not in ("aten", "prim", "moe_compile")
        and _odd(n, set()) is not None
    )


def _active(n: fx.Node) -> bool:
    a = call_args(n)
    return bool(getattr(a, "train", True)) and a.p != 0


def _is_tensor_reduction(n: fx.Node) -> bool:
    return len(n.args) > 1 and not isinstance(n.args[1], fx.Node)
