"""From a recorded function with its experts recovered back to code: one op for the experts, every other operation as it was.

The recording was made at token counts that are primes and no factor of any other size, so a number in it says where it
comes from: 3 * 37 is the number of tokens of a batch of 3, whatever was meant by it in the user's code.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..ir import Experts, Rejection
from ..ir.operands import Join, Operands
from ..ir.reach import reach
from ..ops import bundled, family_of
from ..passes.aten.effects import aliased_arg, mutated_args
from ..passes.aten.names import LIKE, op_name
from ..passes.aten.node import reached
from .call import Call
from .fewer import Fewer

_CAST = torch.ops.aten.to.dtype
_LARGEST = 1 << 40  # numbers beyond are no sizes ("to the end" is 2^63 - 1)


class Regenerated:
    """The code for a call. `boundary`: nodes of the recording as the passes give them (tokens, ids, weights, out, base, up, ...).

    primes: what the token counts of the recording are in code. reshaped: arguments that were recorded in another shape.
    `params`: paths of the module's parameters, which follow the call's own arguments. Raises `Rejection` where an operation
    cannot be written down again.
    """

    def __init__(
        self,
        call: Call,
        gm: fx.GraphModule,
        experts: Experts,
        boundary: Mapping[str, Any],
        primes: Mapping[int, str],
        reshaped: Mapping[str, str] | None = None,
        fewer: Fewer | None = None,
    ) -> None:
        self.call, self.gm, self.boundary, self.fewer = call, gm, boundary, fewer
        self.experts = experts if fewer is None else fewer.experts(experts)
        self.primes = primes if fewer is None or not fewer.cuts else {**primes, **{few: str(every) for every, few in fewer.counts.items()}}
        self.reshaped = reshaped or {}
        self.out: fx.Node = boundary["out"]
        self.family = family_of(experts)
        self.lists = [self._parts(_listed(boundary.get(n))) for n in self.family.names]
        self.views: Mapping[fx.Node, Any] = boundary.get("views") or {}
        self.orders: Mapping[fx.Node, Any] = boundary.get("orders") or {}
        self.join: Join | None = boundary.get("join")
        self.like = laid_out_like(self.out)
        self.live = set(reached((n for n in gm.graph.nodes if n.op == "output"), self._inputs))
        if self.out not in self.live:
            raise Rejection("its result is a view made before the experts wrote to it", stage="read")
        self._check_types()
        self._check_writes()
        placeholders = [n for n in gm.graph.nodes if n in self.live and n.op == "placeholder"]
        self.params = list(dict.fromkeys(n.meta["param_path"] for n in placeholders if "param_path" in n.meta))
        self.stacks = list(dict.fromkeys(n.meta["param_path"] for n in placeholders if "index" in n.meta))  # taken apart
        self.names = {n: n.meta["arg"] if "arg" in n.meta else self._parameter(n) for n in placeholders}
        self.function_name = name if (name := call.fn.__name__).isidentifier() else "expert_loop"
        self.others = [[self._others(ns) for ns in parts] for parts in self.lists]
        self.device = f"{next(iter(call.tensors))}.device"

    def _parameter(self, n: fx.Node) -> str:
        name = f"_p{self.params.index(n.meta['param_path'])}"
        return f"{name}s[{n.meta['index']}]" if "index" in n.meta else name

    def _parts(self, nodes: Sequence[fx.Node]) -> list[Sequence[fx.Node]]:
        """A list in parts of one for each expert that was recorded: gate and up projections stand one after the other."""
        few = len(nodes) if self.fewer is None else self.fewer.own[1]
        n = len(nodes) if few and len(nodes) % few else few
        return [nodes[i : i + n] for i in range(0, len(nodes), n or 1)]

    def _others(self, nodes: Sequence[fx.Node]) -> list[str]:
        """Names of the parameters of experts that the recording had none of, in a list of one for each expert."""
        if self.fewer is None or not self.fewer.cuts or len(nodes) != self.fewer.own[1]:
            return []
        given = [n.all_input_nodes[0] if n.target is _CAST and len(n.args) == 2 else n for n in nodes]
        casts = {n.args[1] for n, p in zip(nodes, given, strict=True) if n is not p}
        plain = all("param_path" in p.meta and "index" not in p.meta for p in given) and not any(n in self.views for n in nodes)
        if not plain or self.join or len(casts) > 1 or casts and any(map(operator.is_, nodes, given)):
            raise Rejection("the weights of its experts are made of others", stage="read")
        paths = self.fewer.paths(self.call.module, [p.meta["param_path"] for p in given])[self.fewer.own[1] :]
        self.params += [p for p in paths if p not in self.params]
        cast = "".join(f".to({dtype})" for dtype in casts)
        return [f"_p{self.params.index(p)}{cast}" for p in paths]

    def _inputs(self, n: fx.Node) -> Sequence[fx.Node]:
        if n is not self.out:
            return n.all_input_nodes
        given = [*(self.boundary.get(x) for x in ("tokens", "ids", "weights", "base")), self.like]
        return [x for x in (*given, *(w for parts in self.lists for ws in parts for w in ws)) if x is not None]

    def _check_types(self) -> None:
        out, tokens, base = self.out.meta["val"].dtype, self.boundary["tokens"].meta["val"].dtype, self.boundary.get("base")
        readers = [u for u in self.out.users if u in self.live]
        if out != tokens and not all(u.op == "call_function" and u.meta["val"].dtype == tokens for u in readers):
            raise Rejection(f"its experts' result is {out} for tokens of {tokens}", stage="read")
        if base is not None and base.meta["val"].dtype != tokens:
            raise Rejection("its result starts from a tensor of another type", stage="read")
        if self.like is None and not self.out.meta["val"].is_contiguous():
            raise Rejection("its result lies in memory with gaps, or over itself", stage="read")

    def _check_writes(self) -> None:
        """Raise `Rejection` if an in-place operation that is left out changes what a remaining one reads after it.

        Not after it: what rows are accumulated onto, which goes into the experts' op as it was before the first of them.
        """
        root: dict[fx.Node, fx.Node] = {}
        order = {n: i for i, n in enumerate(self.gm.graph.nodes)}
        for n in order:
            source = aliased_arg(n)
            root[n] = n if source is None or n is self.out else root[source]  # ours is a tensor of its own
        last: dict[fx.Node, int] = {}  # when the memory is read by what remains; of an argument always, by whoever gave it
        for n in self.live:
            at = len(order) if n.op == "placeholder" else -1
            for x, when in ((n, at), *((x, -1 if n is self.out else order[n]) for x in self._inputs(n))):
                last[root[x]] = max(last.get(root[x], -1), when)
        for n in order:
            if n not in self.live and any(last.get(root[m], -1) > order[n] for m in mutated_args(n)):
                raise Rejection(f"{n.name} writes to a tensor that is read outside of the experts", stage="read")

    # ---- code ----------------------------------------------------------------------------------------------------------

    def code(self, experts: str) -> str:
        """Source of a function of the call's arguments and the parameters; `experts` is what to call for the experts."""
        heads = [*self.call.tensors, *(f"_p{i}" for i in range(len(self.params)))]
        lines = [f"def {self.function_name}({', '.join(heads)}):"]
        lines += [f"    {name} = {name}.{how}" for name, how in self.reshaped.items()]
        lines += [f"    _p{i}s = _p{i}.unbind(0)" for i, path in enumerate(self.params) if path in self.stacks]
        env = dict(self.names)
        indent, result = "    ", "None"
        for n in self.gm.graph.nodes:
            if n not in self.live or n.op == "placeholder":
                continue
            if n.op == "output":
                result = self._value(n.args[0], env)
                continue
            grad = n.meta.get("grad", True)
            if (indent == "    ") != (grad == self.call.grad):
                indent = "    " if grad == self.call.grad else "        "
                lines += [] if grad == self.call.grad else [f"    with torch.{'enable' if grad else 'no'}_grad():"]
            env[n] = f"_v{len(env)}"
            lines += [f"{indent}{line}" for line in self._statement(n, env, experts)]
        return "\n".join([*lines, f"    return {result}"])

    def _statement(self, n: fx.Node, env: dict[fx.Node, str], experts: str) -> list[str]:
        if n is self.out:
            return self._experts(env, experts)
        if n.target is operator.getitem:
            return [f"{env[n]} = {self._value(n.args[0], env)}[{n.args[1]}]"]
        schema = getattr(n.target, "_schema", None)
        if n.op != "call_function" or schema is None:
            raise Rejection(f"{n.name} is a constant that its code made", stage="read")
        if _of_data(n):
            raise Rejection(f"{n.name}, whose size depends on data, is not a part of the experts", stage="read")
        args = [self._value(a, env) for a in n.args]
        args += [f"{k}={self._value(v, env)}" for k, v in n.kwargs.items()]
        namespace, name = schema.name.split("::")
        return [f"{env[n]} = torch.ops.{namespace}.{name}.{n.target._overloadname}({', '.join(args)})"]  # type: ignore[union-attr]

    def _experts(self, env: dict[fx.Node, str], experts: str) -> list[str]:
        b, out = self.boundary, self.out.meta["val"]
        rows, ids, weights = (self._rows(b[n], env) for n in ("tokens", "ids", "weights"))
        base = "None" if b.get("base") is None else self._rows(b["base"], env)
        named = [self._named(*both, env) for both in zip(self.lists, self.others, strict=True)]
        p = Operands.read(named, self.family.names)
        named = (p if self.join is None else self.join.of(p, _below, _beside)).lists(self.family.names)
        lists = ", ".join(f"[{', '.join(names)}]" for names in named)
        plain = ", ".join(_literal(v) for v in self.family.plain(self.experts))
        lines = [f"{env[self.out]} = {experts}({rows}, {ids}, {weights}, {lists}, {base}, {plain})"]
        tail = "" if out.ndim == 2 else f".view({', '.join(self._value(s, env) for s in out.shape)})"
        if out.dtype != b["tokens"].meta["val"].dtype or self.call.autocast is not None:
            tail += f".to({out.dtype})"  # autocast would decide the op's type; the user's function decides for itself
        lines += [f"{env[self.out]} = {env[self.out]}{tail}"] if tail else []
        if self.like is not None:  # zeros_like of a transposed tensor is transposed: so is what was added into it
            v, like = env[self.out], env[self.like]
            lines.append(f"{v} = {v} if {like}.is_contiguous() else torch.empty_like({like}, dtype={v}.dtype).copy_({v})")
        return lines

    def _named(self, parts: Sequence[Sequence[fx.Node]], others: Sequence[Sequence[str]], env: dict[fx.Node, str]) -> list[str]:
        """The weights of a list: in each of its parts those of the experts recorded, then those of the others."""
        return [w for ns, more in zip(parts, others, strict=True) for w in (*(self._weight(n, env) for n in ns), *more)]

    def _rows(self, n: fx.Node, env: dict[fx.Node, str]) -> str:
        v = n.meta["val"]
        return env[n] if v.ndim == 2 else f"{env[n]}.reshape(-1, {v.shape[-1]})"

    def _weight(self, n: fx.Node, env: dict[fx.Node, str]) -> str:
        seen = env[n]
        if (view := self.views.get(n)) is not None:
            sizes = view if self.fewer is None else self.fewer.view(n.meta["val"].shape, view)
            seen = f"{seen}.reshape({', '.join(str(int(s)) for s in sizes)})"
        return seen if n not in self.orders else f"{seen}.permute({self.orders[n]})"

    def _value(self, v: Any, env: Mapping[fx.Node, str]) -> str:
        """A value in an argument list as code: nodes by name, sizes in terms of the tokens' own, the rest as literals."""
        if isinstance(v, fx.Node):
            return env[v]
        if isinstance(v, (list, tuple)):
            inner = ", ".join(self._value(x, env) for x in v)
            return f"[{inner}]" if isinstance(v, list) else f"({inner},)" if len(v) else "()"
        if isinstance(v, dict):
            return "{" + ", ".join(f"{k!r}: {self._value(x, env)}" for k, x in v.items()) + "}"
        if isinstance(v, torch.device):
            return self.device
        if isinstance(v, int) and not isinstance(v, bool) and 0 < v < _LARGEST:
            return self._size(v)
        return _literal(v)

    def _size(self, v: int) -> str:
        factors = []
        for p, spelled in self.primes.items():
            if v % p == 0:
                factors.append(spelled)
                v //= p
        v = v if self.fewer is None else self.fewer.size(v)
        return " * ".join([*factors, *([str(v)] if v != 1 or not factors else [])])

    @functools.cached_property
    def by_op(self) -> Any:
        """The code as a function that stands, for stack traces, where the user's does."""
        return self._compiled(f"torch.ops.moe_compile.{self.family.op}.default", globals())

    @functools.cached_property
    def by_oracle(self) -> Any:
        """The function with the IR's own evaluation for the experts, in float32 (float64 where the tokens are)."""
        return self.moved(0.0)

    def moved(self, near: float, way: float = 1.0) -> Any:
        """As `by_oracle`, with the experts' result off by `way` times what codes of rows on the other side of an edge may change.

        near: `ir.reach.reach`; 0: nothing is off.
        """

        def experts(*args: Any) -> Tensor:
            x, ids, w, p, (add, *_) = bundled(args, self.family.names)
            dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
            out = self.experts.run(x, ids, w, p, add, dtype)
            return (out + way * reach(self.experts, x, ids, w, p, near).to(dtype) if near else out).to(x.dtype)

        return self._compiled("_experts", {"torch": torch, "_experts": experts})

    def _compiled(self, experts: str, names: dict[str, Any]) -> Any:
        code = self.call.fn.__code__
        tree = ast.parse(self.code(experts))
        for node in ast.walk(tree):
            if hasattr(node, "lineno"):
                node.lineno = node.end_lineno = code.co_firstlineno  # type: ignore[attr-defined]
                node.col_offset = node.end_col_offset = 0  # type: ignore[attr-defined]
        space: dict[str, Any] = {}
        exec(compile(tree, code.co_filename, "exec"), names, space)
        return space[self.function_name]


def _of_data(n: fx.Node) -> bool:
    """Whether the size of an operation's result depends on data; that of one_hot does not where it is told how many classes there are, nor
    that of an index of whole numbers."""
    schema = n.target._schema  # type: ignore[union-attr]
    if schema.name == "aten::index":
        chosen = [x for x in n.args[1] if isinstance(x, fx.Node)]  # type: ignore[union-attr]
        return any(x.meta["val"].dtype not in (torch.int64, torch.int32) for x in chosen)
    if schema.name == "aten::one_hot":
        classes = n.args[1] if len(n.args) > 1 else n.kwargs.get("num_classes", -1)
        return not isinstance(classes, int) or classes < 0
    return torch.Tag.dynamic_output_shape in n.target.tags or schema.name == "aten::where" and len(schema.arguments) == 1  # type: ignore[union-attr]


def laid_out_like(out: fx.Node) -> fx.Node | None:
    """The tensor whose layout a result has: it was made by `zeros_like`, `clone` or the like, and added into."""
    while (source := aliased_arg(out)) is not None and out.meta["val"].shape == source.meta["val"].shape:
        out = source
    kept = op_name(out) in LIKE | {"clone"} and out.kwargs.get("memory_format") in (None, torch.preserve_format)
    return out.args[0] if kept and isinstance(out.args[0], fx.Node) else None


def _literal(v: Any) -> str:
    if isinstance(v, (list, tuple)):
        return f"[{', '.join(_literal(x) for x in v)}]"
    if isinstance(v, float):  # neither infinity nor NaN has a literal
        return repr(v).replace("inf", "1e999") if v == v else "(1e999 - 1e999)"
    if v is None or isinstance(v, (bool, int, str, torch.dtype, torch.layout, torch.memory_format)):
        return repr(v)
    raise Rejection(f"a constant of type {type(v).__name__} in its operations", stage="read")


def _below(names: list[str]) -> str:
    """Matrices one below the other, as code."""
    return f"torch.cat([{', '.join(names)}], -2)"


def _beside(names: list[str], numbers: Sequence[float]) -> str:
    """Matrices side by side, each times its number, as code."""
    return f"torch.cat([{', '.join(n if c == 1 else f'{n} * {c!r}' for n, c in zip(names, numbers, strict=True))}], -1)"


def _listed(v: Any) -> list[fx.Node]:
    return [] if v is None else list(v) if isinstance(v, (list, tuple)) else [v]
