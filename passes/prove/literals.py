"""Numbers that a graph holds as literals, translated for a probe: `view(1024, 8, 2048)` of a tensor that has 7 rows there.

Every rule is the meaning of an op's argument: sizes of its result, bounds along a dimension, whole numbers that whole numbers meet.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..aten import names
from ..aten.element import normal_dim, shape_of
from ..aten.names import op_name
from ..aten.node import schema_of
from .sizes import SMALL, Dim, Script, Sizes, Unfree, regroup

Args = tuple[Any, ...]
Env = Mapping[fx.Node, Any]
Rule = Callable[["Literals", fx.Node, Env, dict[str, Any]], dict[str, Any]]
RULES: dict[str, Rule] = {}
_SHIFTS = frozenset("bitwise_right_shift __rshift__ bitwise_left_shift __lshift__".split())


class Literals:
    """The arguments that the calls of a region have on probes, as `sizes` and `script` say; made once for inputs of the same shapes."""

    def __init__(self, sizes: Sizes, script: Script) -> None:
        self.sizes, self.script = sizes, script
        self.plain: set[fx.Node] = set()  # calls without numbers
        self.made: dict[Any, tuple[Args, dict[str, Any]]] = {}

    def of(self, n: fx.Node, env: Env) -> tuple[Args, dict[str, Any]]:
        """(args, kwargs) in which only nodes are still to be loaded."""
        if n in self.plain:
            return n.args, n.kwargs
        if n.target is operator.getitem or not any(_holds_number(v) for v in (*n.args, *n.kwargs.values())):
            self.plain.add(n)
            return n.args, n.kwargs
        key = (n, *(v.shape if isinstance(v := env.get(x), Tensor) else v for x in n.all_input_nodes))
        found = self.made.get(key)
        if found is None:
            found = self.made[key] = self._translated(n, env)
        return found

    def _translated(self, n: fx.Node, env: Env) -> tuple[Args, dict[str, Any]]:
        schema = schema_of(n)
        if schema is None:  # arithmetic of sizes
            return tuple(self.number(n, i, a) for i, a in enumerate(n.args)), dict(n.kwargs)
        specs = schema.arguments
        given = {s.name: v for s, v in zip(specs, n.args, strict=False)} | dict(n.kwargs)
        rule = RULES.get(op_name(n))
        new = _sizes_and_scalars(self, n, env, given) if rule is None else {**given, **rule(self, n, env, given)}
        positional = tuple(new[s.name] for s in specs[: len(n.args)])
        named = {k: v for k, v in new.items() if k not in {s.name for s in specs[: len(n.args)]}}
        return positional, named

    def number(self, n: fx.Node, place: Any, value: Any) -> Any:
        """A number that stands for itself, or for one of the dimensions it is a multiple of."""
        if isinstance(value, bool) or not isinstance(value, int) or value <= 1:
            return value
        return self.script.choose((n, place), self.sizes.candidates(value))

    def itself(self, n: fx.Node, place: Any, value: Any) -> Any:
        """As `number`, for one that is itself first where it may be an expert's, or meets codes of words."""
        own = type(value) is int and value > 1 and (value <= max(self.sizes.kept, default=0) or _of_words(n))
        if not own:
            return self.number(n, place, value)
        return self.script.choose((n, place), (value, *self.sizes.candidates(value)))

    def view(
        self, n: fx.Node, old_in: tuple[Dim, ...], new_in: tuple[int, ...], old_out: tuple[Dim, ...], given: Args, env: Env
    ) -> list[int]:
        """Sizes of a view's result, for which the graph has numbers, or nodes that compute them (`given`)."""
        computed = {d: int(env[a]) for d, a in enumerate(given) if isinstance(a, fx.Node)}
        runs = regroup(self.sizes, old_in, new_in, old_out, computed)
        return [s for r, options in enumerate(runs) for s in self.script.choose((n, r), options)]


def _holds_number(v: Any) -> bool:
    """Whether an argument is a whole number, or a list with some in it (sizes that are computed stand beside them)."""
    if isinstance(v, (list, tuple)):
        return any(_holds_number(x) for x in v)
    return isinstance(v, int) and not isinstance(v, bool)


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return register


def _sizes_and_scalars(t: Literals, n: fx.Node, env: Env, given: dict[str, Any]) -> dict[str, Any]:
    """Any other op: numbers that are sizes by their type (`SymInt`), and those that meet whole numbers; dims and counts stay."""
    out = dict(given)
    whole = _whole(n)
    if whole and op_name(n) in ("eq", "ne"):  # `ids == 40` is expert 40, whatever 40 is a multiple of
        return {k: t.itself(n, k, v) for k, v in given.items()}
    for spec in schema_of(n).arguments:
        kind = _kind(spec.real_type)
        if spec.name in given and (kind == "SymIntType" or whole and kind == "NumberType"):
            v = given[spec.name]
            listed = isinstance(v, (list, tuple))
            number = t.itself if kind == "NumberType" and _of_words(n) else t.number
            out[spec.name] = [number(n, (spec.name, i), x) for i, x in enumerate(v)] if listed else number(n, spec.name, v)
    return out


def _of_words(n: fx.Node) -> bool:
    """Whether an operation is done to codes that were shifted out of words: `(q >> 8 & 255) - 128`."""
    x = n.args[0] if n.op == "call_function" and n.args else None
    while isinstance(x, fx.Node) and x.args and op_name(x) in names.VIEW | names.CAST | _SHIFTS | {"bitwise_and", "__and__"}:
        if op_name(x) in _SHIFTS:
            return True
        x = x.args[0]
    return False


def _kind(t: Any) -> str:
    """The kind of a schema's type, of a list's or an optional's that of its elements."""
    while t.kind() in ("ListType", "OptionalType"):
        t = t.getElementType()
    return str(t.kind())


def _whole(n: fx.Node) -> bool:
    """Whether an op works on integers."""
    tensors = [x.meta["val"] for x in n.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]
    own = n.meta.get("val")
    tensors += [own] if not tensors and isinstance(own, Tensor) else []
    return bool(tensors) and not any(v.dtype.is_floating_point or v.dtype is torch.bool for v in tensors)


def _input(n: fx.Node, env: Env, given: dict[str, Any]) -> tuple[tuple[Dim, ...], tuple[int, ...]]:
    """(the first tensor's shape in the graph, its shape on the probe)."""
    x = given.get("self", given.get("input", given.get("tensor")))
    assert isinstance(x, fx.Node)
    return shape_of(x), tuple(env[x].shape)


@rule("view", "reshape", "_unsafe_view")
def _view(t: Literals, n: fx.Node, env: Env, given: dict[str, Any]) -> dict[str, Any]:
    name = "shape" if "shape" in given else "size"
    if name not in given:  # view.dtype
        return {}
    old, new = _input(n, env, given)
    return {name: t.view(n, old, new, shape_of(n), tuple(given[name]), env)}


@rule("unflatten")
def _unflatten(t: Literals, n: fx.Node, env: Env, given: dict[str, Any]) -> dict[str, Any]:
    old, new = _input(n, env, given)
    d = normal_dim(given["dim"], len(old))
    many = len(shape_of(n)) - len(old) + 1
    return {"sizes": t.view(n, old[d : d + 1], new[d : d + 1], shape_of(n)[d : d + many], tuple(given["sizes"]), env)}


@rule("expand", "broadcast_to")
def _expand(t: Literals, n: fx.Node, env: Env, given: dict[str, Any]) -> dict[str, Any]:
    (old, new), out = _input(n, env, given), shape_of(n)
    pad = len(out) - len(old)
    sizes = []
    for d, s in enumerate(out):
        same = d >= pad and old[d - pad] != 1
        sizes.append(new[d - pad] if same else _size(t, n, d, given["size"][d], s, env))
    return {"size": sizes}


def _size(t: Literals, n: fx.Node, d: int, literal: Any, old: Dim, env: Env) -> Any:
    """A dim of a result that nothing else tells: the graph's own number, or what computes it."""
    if isinstance(literal, fx.Node):
        return literal
    return t.number(n, d, old) if isinstance(old, int) else t.sizes.of(old)


@rule("zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full")
def _create(t: Literals, n: fx.Node, env: Env, given: dict[str, Any]) -> dict[str, Any]:
    out = {"size": [_size(t, n, d, a, s, env) for d, (a, s) in enumerate(zip(given["size"], shape_of(n), strict=True))]}
    if "fill_value" in given and _whole(n) and not n.meta["val"].dtype.is_floating_point:
        out["fill_value"] = t.number(n, "fill", given["fill_value"])
    return out


@rule("arange", "eye", "linspace")
def _arange(t: Literals, n: fx.Node, env: Env, given: dict[str, Any]) -> dict[str, Any]:
    return {k: t.number(n, k, v) for k, v in given.items() if k in ("start", "end", "n", "m", "steps")}


def _along(n: fx.Node, env: Env, given: dict[str, Any]) -> Callable[[Any], Any]:
    """Positions and lengths along a dimension that may have another size: in proportion, where that is a whole number."""
    old, new = _input(n, env, given)
    d = normal_dim(given.get("dim", 0), len(old))
    before, after = old[d], new[d]

    def moved(v: Any) -> Any:
        if not isinstance(v, int) or not isinstance(before, int) or before == after or v in (0, -1) or abs(v) > before:
            return v
        if v * after % before:
            raise Unfree(before)
        return v * after // before

    return moved


@rule("slice", "narrow", *names.SPLIT)
def _bounds(t: Literals, n: fx.Node, env: Env, given: dict[str, Any]) -> dict[str, Any]:
    moved = _along(n, env, given)
    own = {"start": given["start"]} if _phase(n, env, given) else {}
    out = {k: own[k] if k in own else moved(v) for k, v in given.items() if k in ("start", "end", "length", "split_size")}
    lists = {
        k: [*map(moved, v)] for k, v in given.items() if k in ("split_sizes", "split_size", "indices") and isinstance(v, (list, tuple))
    }
    return out | lists


def _phase(n: fx.Node, env: Env, given: dict[str, Any]) -> bool:
    """Whether a slice begins within its first step and goes round evenly, in the graph and on the probe: x[..., 1::2]."""
    start, step = given.get("start"), given.get("step", 1)
    if not isinstance(start, int) or not isinstance(step, int) or not 0 < start < step:
        return False
    old, new = _input(n, env, given)
    d = normal_dim(given.get("dim", 0), len(old))
    return isinstance(old[d], int) and old[d] % step == 0 and new[d] % step == 0


@rule("select")
def _select(t: Literals, n: fx.Node, env: Env, given: dict[str, Any]) -> dict[str, Any]:
    old, new = _input(n, env, given)
    d, i = normal_dim(given["dim"], len(old)), given["index"]
    if not isinstance(i, int) or old[d] == new[d] or i < 0:
        return {}
    if i == old[d] - 1:
        return {"index": new[d] - 1}
    if i >= new[d]:
        raise Unfree(old[d])
    return {}


# by how many bits codes are shifted is no size of anything
rule(*_SHIFTS)(lambda t, n, env, given: {})


@rule("repeat")
def _repeat(t: Literals, n: fx.Node, env: Env, given: dict[str, Any]) -> dict[str, Any]:
    return {"repeats": [t.number(n, i, r) if isinstance(r, int) and r > SMALL else r for i, r in enumerate(given["repeats"])]}


@rule("repeat_interleave")
def _repeat_interleave(t: Literals, n: fx.Node, env: Env, given: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"output_size": None} if "output_size" in given else {}
    if isinstance(given.get("repeats"), int) and given["repeats"] > SMALL:
        out["repeats"] = t.number(n, "repeats", given["repeats"])
    return out


@rule("as_strided", "unfold", "roll")
def _memory(t: Literals, n: fx.Node, env: Env, given: dict[str, Any]) -> dict[str, Any]:
    """What speaks of memory, or of places all along a dimension, is only known at the graph's own sizes."""
    old, new = _input(n, env, given)
    changed = [a for a, b in zip(old, new, strict=True) if isinstance(a, int) and a != b]
    if changed:
        raise Unfree(math.prod(changed))
    return {}
