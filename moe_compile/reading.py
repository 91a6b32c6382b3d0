"""Readings: what an expert loop means, found by example, tried on routings it was not read from, and put into one call.

A loop such as ``for e in hit: ...`` cannot be traced, but its function can be run. `read` records one run on probes
(`passes.record`), asks the passes for the meaning, compares meaning and function on other routings, and writes the
function that Dynamo may inline instead. Whatever fails on the way is a `Rejection`, and the user's function stays.
"""

from __future__ import annotations

import ast
import functools
import operator
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from .bench import BATCH, Bench, Call, NoExperts, Roles, number_of_experts, roles_of, token_count
from .fingerprint import fingerprint
from .ir import Experts, Rejection
from .ops import experts_args
from .passes.record import neutral, record_symbolically

Recover = Callable[[fx.GraphModule], Any]

_TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_SMALL = 1 << 22  # parameter elements up to which their gradients are compared too


# ---- the reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What a function does with its arguments, proved on probes.

    `run(*arguments, *parameters)` is what may be inlined in its place: `arguments` by name in that order, then the module's
    parameters at `params`. `reads`: what the function asked its module for, with what it got (see `fingerprint`).
    """

    experts: Experts
    run: types.FunctionType
    arguments: tuple[str, ...]
    params: tuple[str, ...]
    reads: Mapping[tuple[str, str], Any]
    source: str


@dataclass
class Trial:
    """The outcome of one attempt at reading, with everything it depended on; `about_experts`: ids did choose something."""

    outcome: Reading | Rejection
    reads: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    about_experts: bool = True


@neutral()
def read(call: Call, recover: Recover) -> Trial:
    """Read a call's function. Never raises for what the function does: the outcome is then a `Rejection` with its source."""
    reads: set[tuple[str, str]] = set()
    try:
        roles = roles_of(call.tensors)
        if roles is None:
            raise Rejection("its arguments are not tokens, expert ids and routing weights", stage="read")
        outcome: Reading | Rejection = _read(call, roles, recover, reads)
    except NoExperts as r:
        outcome = r
    except Rejection as r:
        outcome = Rejection(r.reason, None, r.stage, r.source or call.source)
    except Exception as e:
        outcome = Rejection(f"reading it failed: {type(e).__name__}: {e}", stage="read", source=call.source)
    prints = {} if call.module is None else {r: fingerprint(call.module, *r) for r in sorted(reads)}
    if isinstance(outcome, Reading):
        outcome = replace(outcome, reads=prints)
        _meanings.append(outcome)
    return Trial(outcome, prints, not isinstance(outcome, NoExperts))


def _read(call: Call, roles: Roles, recover: Recover, reads: set[tuple[str, str]]) -> Reading:
    sharp = Bench(call, roles, torch.float32)
    if sharp.probe is not None:
        sharp.probe.reads = reads
    n = number_of_experts(sharp)
    own = Bench(call, roles)
    if own.probe is not None:
        own.probe.reads = reads
    dims = {d for t in (*own.given.values(), *(own.probe.tensors.values() if own.probe else ())) for d in t.shape}
    dims |= {n, roles.k, *(d for s in call.tensors.values() for d in s.shape if isinstance(d, int))}
    tokens = token_count(n, roles.k, dims)
    if len(call.tensors[roles.tokens].shape) == 3:
        tokens *= BATCH
    gm = record_symbolically(call.fn, [own.arguments(own.routing(tokens, range(n))) for _ in range(2)], own.probe)
    gm.meta["roles"] = roles._asdict()
    found = recover(gm)
    if isinstance(found, Rejection):
        raise found
    written = _Writer(call, roles, gm, found.ir)
    if found.ir.experts.num_experts + found.ir.experts.num_identity < n:
        raise Rejection(f"only {found.ir.experts.num_experts} of {n} experts were recovered", stage="read")
    _confirm(written, sharp, own, n, tokens)
    run = written.function()
    for count in (tokens, 1):
        written.check_code(own, own.arguments(own.routing(count, range(n))), run)
    arguments = (*call.tensors, *call.constants)
    return Reading(found.ir.experts, run, arguments, tuple(written.params), {}, call.source)


def _confirm(written: _Writer, sharp: Bench, own: Bench, n: int, tokens: int) -> None:
    """Function against meaning on routings that the recording never saw. Raises `Rejection` where they differ."""
    k, few = sharp.roles.k, min(n, max(sharp.roles.k, 3))
    unseen = {
        "other tokens": sharp.routing(tokens + BATCH, range(n)),
        "few experts": sharp.routing(tokens, range(few)),
        "only the first experts": sharp.routing(tokens, range(k)),
        "only the last experts": sharp.routing(tokens, range(n - k, n)),
        "one token": sharp.routing(1, range(n)),
    }
    for name, ids in unseen.items():
        written.compare(sharp, sharp.arguments(ids), name)
    beyond = unseen["few experts"].clone()
    beyond[::2, 0] = n
    written.compare(sharp, sharp.arguments(beyond), "an id beyond the last expert", may_raise=True)
    written.compare_gradients(sharp, sharp.arguments(unseen["few experts"]))
    device = sharp.call.device
    bench = own if device.type in ("cpu", "meta") else Bench(own.call, own.roles, device=device)
    written.compare(bench, bench.arguments(bench.routing(tokens, range(n))), f"{bench.device.type} in its own types", sharp.call.autocast)


# ---- the function in its place ---------------------------------------------------------------------------------------

_VIEWS = {"view", "reshape", "flatten", "unflatten", "transpose", "t", "permute", "numpy_T", "mT", "unsqueeze", "squeeze"}
_VIEWS |= {"select", "slice", "narrow", "chunk", "split", "split_with_sizes", "unbind"}


class _Writer:
    """Turns the recovered experts and their boundary into straight-line code over arguments and parameters."""

    def __init__(self, call: Call, roles: Roles, gm: fx.GraphModule, ir: Any) -> None:
        self.call, self.roles, self.experts = call, roles, ir.experts
        b = ir.boundary
        self.lists = [_listed(b.get(n)) for n in ("up", "down", "up_bias", "down_bias")]
        self.views: Mapping[fx.Node, Any] = b.get("views") or {}
        if b.get("base") is not None:
            raise Rejection("its result does not start from zero", stage="read")
        self.params = list(dict.fromkeys(p.meta["param_path"] for p in self._sources() if "param_path" in p.meta))
        for name in ("tokens", "ids", "weights"):
            if self._argument(b[name]) != getattr(roles, name):
                raise Rejection(f"the {name} are not the function's argument as it came", stage="read")
        tokens = next(n for n in gm.graph.nodes if n.meta.get("arg") == roles.tokens)
        out = next(n for n in gm.graph.nodes if n.op == "output").args[0]
        if not isinstance(out, fx.Node):
            raise Rejection("it returns something else than one tensor", stage="read")
        self.shape = self._result_shape(tuple(tokens.meta["val"].shape), tuple(out.meta["val"].shape))
        self.dtype = out.meta["val"].dtype
        if self.dtype != tokens.meta["val"].dtype:
            raise Rejection("its result has another type than its tokens", stage="read")

    def _sources(self) -> list[fx.Node]:
        found = []
        for n in (n for ns in self.lists for n in ns):
            while n.op != "placeholder":
                if not _is_view(n):
                    raise Rejection(f"a weight goes through {n.target} first", stage="read")
                n = n.args[0]
            found.append(n)
        return found

    def _argument(self, n: Any) -> str:
        while isinstance(n, fx.Node) and n.op != "placeholder" and _is_view(n):
            n = n.args[0]
        return n.meta.get("arg", "") if isinstance(n, fx.Node) else ""

    def _result_shape(self, x: tuple[int, ...], out: tuple[int, ...]) -> list[str] | None:
        """The result's sizes as code; None for [T, H]."""
        total = functools.reduce(operator.mul, x[:-1])
        if out == (total, self.experts.out_features) and len(x) == 2:
            return None
        sizes = {total: "rows.shape[0]", 1: "1", **{s: f"{self.roles.tokens}.shape[{d}]" for d, s in enumerate(x[:-1])}}
        if (
            out[-1] != self.experts.out_features
            or functools.reduce(operator.mul, out[:-1]) != total
            or any(s not in sizes for s in out[:-1])
        ):
            raise Rejection(f"its result has the shape {list(out)} for tokens {list(x)}", stage="read")
        return [*(sizes[s] for s in out[:-1]), str(out[-1])]

    def code(self) -> str:
        """Source of the function; `rows` are the tokens as [T, H]."""
        r, t = self.roles, self.call.tensors
        names = [*t, *self.call.constants, *(f"p{i}" for i in range(len(self.params)))]
        lines = [f"def {self.call.fn.__name__}({', '.join(names)}):"]
        lines.append(f"    rows = {r.tokens}" + ("" if len(t[r.tokens].shape) == 2 else f".reshape(-1, {t[r.tokens].shape[-1]})"))
        known = {"param_path": {p: f"p{i}" for i, p in enumerate(self.params)}, "arg": {n: n for n in t}}
        env: dict[fx.Node, str] = {}
        lists = [f"[{', '.join(self._viewed(n, known, env, lines) for n in ns)}]" for ns in self.lists]
        route = [n if len(t[n].shape) == 2 else f"{n}.reshape(-1, {r.k})" for n in (r.ids, r.weights)]
        plain = ", ".join(_literal(v) for v in experts_args(self.experts))
        lines.append(f"    out = torch.ops.moe_compile.experts.default(rows, {', '.join(route)}, {', '.join(lists)}, None, {plain})")
        if self.call.autocast is not None:
            lines.append(f"    out = out.to({self.dtype})")  # what autocast makes of the op; the user's function decides for itself
        lines.append("    return out" + ("" if self.shape is None else f".view({', '.join(self.shape)})"))
        return "\n".join(lines)

    def _viewed(self, n: fx.Node, known: Mapping[str, Mapping[str, str]], env: dict[fx.Node, str], lines: list[str]) -> str:
        name = self._weight(n, known, env, lines)
        return name if n not in self.views else f"{name}.view({', '.join(_literal(int(s)) for s in self.views[n])})"

    def _weight(self, n: fx.Node, known: Mapping[str, Mapping[str, str]], env: dict[fx.Node, str], lines: list[str]) -> str:
        """The name of a weight in the code; views on the way get a line each, once."""
        if n.op == "placeholder":
            return known["param_path"][n.meta["param_path"]] if "param_path" in n.meta else known["arg"][n.meta["arg"]]
        if n not in env:
            source = self._weight(n.args[0], known, env, lines)  # type: ignore[arg-type]
            args = ", ".join([source, *(_literal(a) for a in n.args[1:]), *(f"{k}={_literal(v)}" for k, v in n.kwargs.items())])
            env[n] = f"v{len(env)}"
            call = f"{source}[{n.args[1]}]" if n.target is operator.getitem else f"{_spelled(n.target)}({args})"
            lines.append(f"    {env[n]} = {call}")
        return env[n]

    def function(self) -> types.FunctionType:
        """The code as a function that stands, for stack traces, where the user's function stands."""
        code = self.call.fn.__code__
        tree = ast.parse(self.code())
        for node in ast.walk(tree):
            if hasattr(node, "lineno"):
                node.lineno = node.end_lineno = code.co_firstlineno  # type: ignore[attr-defined]
                node.col_offset = node.end_col_offset = 0  # type: ignore[attr-defined]
        space: dict[str, Any] = {}
        exec(compile(tree, code.co_filename, "exec"), globals(), space)
        return space[self.call.fn.__name__]  # type: ignore[no-any-return]

    def check_code(self, bench: Bench, arguments: Mapping[str, Any], run: types.FunctionType) -> None:
        """Raise `Rejection` unless the function gives a tensor of the same shape and type as the user's, on the meta device."""
        given = [arguments[n] for n in (*self.call.tensors, *self.call.constants)]
        params = [] if bench.probe is None else [bench.probe.tensors[p] for p in self.params]
        with neutral():
            out = run(*(t.to("meta") if isinstance(t, Tensor) else t for t in (*given, *params)))
        expected = bench.run(arguments, self.call.autocast)
        if out.shape != expected.shape or out.dtype != expected.dtype:
            raise Rejection(
                f"its result is {list(expected.shape)} {expected.dtype}, ours would be {list(out.shape)} {out.dtype}", stage="confirm"
            )

    # -- confirmation ----------------------------------------------------------------------------------------------------

    def meaning(self, bench: Bench, arguments: Mapping[str, Any]) -> Tensor:
        """The IR's value for these arguments: [T, H_out]; float32, or float64 where the arguments are."""
        values = {n: v for n, v in arguments.items() if isinstance(v, Tensor)}
        memo: dict[fx.Node, Any] = {}

        def value(n: fx.Node) -> Any:
            if n not in memo:
                if n.op == "placeholder":
                    memo[n] = values[n.meta["arg"]] if "arg" in n.meta else bench.probe.tensors[n.meta["param_path"]]  # type: ignore[union-attr]
                else:
                    memo[n] = n.target(value(n.args[0]), *n.args[1:], **n.kwargs)  # type: ignore[operator, arg-type]
            return memo[n]

        def viewed(n: fx.Node) -> Any:
            return value(n).view(tuple(int(s) for s in self.views[n])) if n in self.views else value(n)

        r = self.roles
        x = values[r.tokens].reshape(-1, values[r.tokens].shape[-1])
        ids, w = values[r.ids].reshape(-1, r.k), values[r.weights].reshape(-1, r.k)
        return self.experts.evaluate(x, ids, w, *([viewed(n) for n in ns] for ns in self.lists), dtype=torch.float32)

    def compare(
        self, bench: Bench, arguments: Mapping[str, Any], what: str, autocast: torch.dtype | None = None, may_raise: bool = False
    ) -> None:
        """Raise `Rejection` unless function and meaning agree row by row; `may_raise`: the function may refuse these arguments."""
        try:
            out = bench.run(arguments, autocast)
        except Rejection:
            raise
        except Exception as e:
            if may_raise:
                return
            raise Rejection(f"it fails on {what}: {type(e).__name__}: {str(e)[:200]}", stage="confirm") from e
        tol = _TOLERANCE[autocast or bench.dtype or self.dtype]
        if not isinstance(out, Tensor) or out.dtype != (bench.dtype or self.dtype) or not _agree(out, self.meaning(bench, arguments), tol):
            raise Rejection(f"what was read does not hold for {what}", stage="confirm")

    def compare_gradients(self, bench: Bench, arguments: Mapping[str, Any]) -> None:
        """Raise `Rejection` unless the gradients to tokens and weights agree (to small parameters too)."""
        leaves = [arguments[self.roles.tokens], arguments[self.roles.weights]]
        params = [] if bench.probe is None else [bench.probe.tensors[p] for p in self.params]
        params += [bench.given[n] for n in self.roles.params]
        if sum(p.numel() for p in params) <= _SMALL:
            leaves += params
        for t in leaves:
            t.requires_grad_(True)
        try:
            out = bench.run(arguments)
            cotangent = torch.randn(out.shape, generator=bench.generator).to(out.device)
            with torch.enable_grad():
                a = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
                meant = self.meaning(bench, arguments)
                b = torch.autograd.grad(meant, leaves, cotangent.view_as(meant), allow_unused=True)
        except RuntimeError as e:
            raise Rejection(f"it has no gradient: {str(e)[:200]}", stage="confirm") from e
        finally:
            for t in leaves:
                t.requires_grad_(False)
        for t, x, y in zip(leaves, a, b, strict=True):
            zero = torch.zeros_like(t)
            if not _agree(zero if x is None else x, zero if y is None else y, 1e-4):
                raise Rejection("its gradients are not those of what was read", stage="confirm")


def _listed(v: Any) -> list[fx.Node]:
    return [] if v is None else list(v) if isinstance(v, (list, tuple)) else [v]


def _is_view(n: fx.Node) -> bool:
    if n.target is operator.getitem:
        return isinstance(n.args[0], fx.Node) and _is_view(n.args[0])
    schema = getattr(n.target, "_schema", None)
    return schema is not None and str(schema.name).removeprefix("aten::") in _VIEWS and len(n.all_input_nodes) == 1


def _literal(v: Any) -> str:
    """A constant as code; infinity has no literal of its own in Python."""
    if isinstance(v, (list, tuple)):
        return f"[{', '.join(_literal(x) for x in v)}]"
    return repr(v).replace("inf", "1e999") if isinstance(v, float) else repr(v)


def _spelled(target: Any) -> str:
    namespace, name = target._schema.name.split("::")
    return f"torch.ops.{namespace}.{name}.{target._overloadname}"


def _agree(a: Tensor, b: Tensor, tol: float) -> bool:
    """Rows of a and b within `tol` of the row's largest entry (rows of nothing: of the whole)."""
    a, b = (t.detach().to("cpu", torch.float64).reshape(-1, t.shape[-1] if t.ndim else 1) for t in (a, b))
    if a.shape != b.shape or not bool(torch.isfinite(a).all()):
        return False
    size = b.abs().amax(-1)
    floor = tol * 1e-3 * size.max() if size.numel() else 0.0
    return bool(((a - b).abs().amax(-1) <= tol * size + floor).all())


_meanings: list[Reading] = []


def reading_of(plain: list[Any], hidden: int) -> Reading | None:
    """The reading behind a captured ``experts`` call: `plain` are its arguments after the tensors, `hidden` its tokens' width."""
    for r in _meanings:
        if r.experts.hidden == hidden and experts_args(r.experts) == list(plain):
            return r
    return None


def matches(trial: Trial, module: nn.Module | None) -> bool:
    """A trial holds for another module if that answers everything the function asked in the same way."""
    return module is None or all(fingerprint(module, *r) == p for r, p in trial.reads.items())
