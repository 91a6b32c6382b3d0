"""Readings: what an expert loop means, found by example, tried on routings it was not read from, and put into one call.

A loop such as ``for e in hit: ...`` cannot be traced, but its function can be run. `read` records one run on probes
(`passes.record`), asks the passes for the meaning, writes the function that Dynamo may inline instead (`regenerate`), and
compares the two on other routings. Whatever fails on the way is a `Rejection`, and the user's function stays.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ir import Experts, Rejection
from .bench import Bench, BlockBench, Call, DispatchBench, NoExperts, number_of_experts, primes, roles_of
from .fingerprint import fingerprint
from .probe import candidates
from .record import neutral, record_symbolically
from .regenerate import Regenerated

Recover = Callable[[fx.GraphModule], Any]

_TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_COUNTS = {"numel", "nelement", "len"}
_FEWEST, _MANY, _WORK = 512, 2048, 1 << 30
_SMALL = 1 << 22  # parameter elements up to which their gradients are compared too


@dataclass(frozen=True)
class Reading:
    """What a function does with its arguments, proved on probes.

    `run(*arguments, *parameters)` is what may be inlined in its place: `arguments` by name in that order, then the module's
    parameters at `params`. `reads`: what the function asked its module for, with what it got (see `fingerprint`).
    `distinct`: it holds only where no token has an expert twice.
    """

    experts: Experts
    run: types.FunctionType
    arguments: tuple[str, ...]
    params: tuple[str, ...]
    reads: Mapping[tuple[str, str], Any]
    source: str
    distinct: bool = False


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
        reader = _Dispatch(call, reads) if roles_of(call.tensors) is not None else _Block(call, reads)
        outcome: Reading | Rejection = _read(call, reader, recover)
    except NoExperts as r:
        outcome = r
    except Rejection as r:
        outcome = Rejection(r.reason, None, r.stage, r.source or call.source)
    except Exception as e:
        outcome = Rejection(f"reading it failed: {type(e).__name__}: {e}", stage="read", source=call.source)
    prints = {} if call.module is None else {r: fingerprint(call.module, *r) for r in sorted(reads)}
    if isinstance(outcome, Reading):
        outcome = replace(outcome, reads=prints)
    return Trial(outcome, prints, not isinstance(outcome, NoExperts))


def _read(call: Call, reader: _Dispatch | _Block, recover: Recover) -> Reading:
    gm = reader.record()
    found = recover(gm)
    if isinstance(found, Rejection):
        raise found
    found_experts = found.ir.experts.num_experts + found.ir.experts.num_identity
    if found_experts < reader.experts:
        raise Rejection(f"only {found_experts} of {reader.experts} experts were recovered", stage="read")
    written = Regenerated(call, gm, found.ir.experts, found.ir.boundary, reader.primes, reader.reshaped)
    _confirm(written, reader)
    arguments, distinct = (*call.tensors, *call.constants), not _holds_for_repeats(written, reader)
    return Reading(found.ir.experts, written.by_op, arguments, tuple(written.params), {}, call.source, distinct)


class _Dispatch:
    """Recording and trials of a function of tokens, ids and routing weights."""

    def __init__(self, call: Call, reads: set[tuple[str, str]]) -> None:
        self.call = call
        self.sharp = DispatchBench(call, torch.float32)
        _log_reads(self.sharp, reads)
        self.experts = number_of_experts(self.sharp)
        self.own = self.sharp.again()
        _log_reads(self.own, reads)
        r, k = self.sharp.roles, self.sharp.roles.k
        # more tokens than experts: then no expert's number is a token count
        self.lead = primes(
            max(17, self.experts + 1, -(-2 * self.experts // k)),
            self.own.sizes() | {self.experts, k},
            len(call.tensors[r.tokens].shape) - 1,
        )
        self.primes = {p: f"{r.tokens}.shape[{d}]" for d, p in enumerate(self.lead)}
        # ids and weights may come flattened; the recording has them as [T, k], from where the function's own shape is a view
        self.shapes = {n: len(call.tensors[n].shape) for n in (r.ids, r.weights)}
        self.reshaped = {n: f"reshape(-1, {k})" for n, rank in self.shapes.items() if call.tensors[n].shape[1:] != (k,)}

    def record(self) -> fx.GraphModule:
        tokens, k = torch.Size(self.lead).numel(), self.own.roles.k
        routings = [self.own.arguments(self.own.routing(tokens, range(self.experts)), self.lead) for _ in range(2)]
        given = [{n: v.reshape(-1, k) if n in self.reshaped else v for n, v in a.items()} for a in routings]
        shapes = {n: routings[0][n].shape for n in self.reshaped}

        def fn(*module: Any, **arguments: Any) -> Any:
            return self.call.fn(*module, **{n: v.reshape(shapes[n]) if n in shapes else v for n, v in arguments.items()})

        gm = record_symbolically(fn, given, self.own.probe)
        gm.meta["roles"] = self.own.roles._asdict()
        return gm

    def trials(self, b: DispatchBench) -> Iterator[tuple[str, dict[str, Any]]]:
        """Routings that the recording never saw, with as few tokens as they need."""
        n, k = self.experts, b.roles.k
        yield "other tokens", self.usual(b)
        yield "few experts", b.arguments(b.routing(11, range(min(n, max(k, 3)))))
        yield "only the first experts", b.arguments(b.routing(5, range(k)))
        yield "only the last experts", b.arguments(b.routing(6, range(n - k, n)))
        yield "one token", b.arguments(b.routing(1, range(n)))
        many = _affordable(b, k)
        if many > self.lead[-1]:  # an expert may have room for so many tokens and no more
            yield "many tokens", b.arguments(b.routing(many, range(k)))

    def optional(self, b: DispatchBench) -> Iterator[tuple[str, dict[str, Any]]]:
        """Routings that the function may refuse."""
        ids = b.routing(7, range(self.experts))
        ids[::2, 0] = self.experts
        yield "an id beyond the last expert", b.arguments(ids)

    def twice(self, b: DispatchBench) -> dict[str, Any] | None:
        """Some tokens have an expert twice: both their weights may count, or one of them."""
        ids = b.routing(7, range(self.experts))
        ids[::2, -1] = ids[::2, 0]
        return b.arguments(ids) if b.roles.k > 1 else None

    def usual(self, b: DispatchBench) -> dict[str, Any]:
        """Every expert is hit."""
        return b.arguments(b.routing(-(-self.experts // b.roles.k) + 2, range(self.experts)))


class _Block:
    """Recording and trials of a function of tokens alone, which holds the router too."""

    reshaped: Mapping[str, str] = {}
    experts = 0  # not known before the recording

    def __init__(self, call: Call, reads: set[tuple[str, str]]) -> None:
        self.call = call
        self.sharp = BlockBench(call, torch.float32)
        _log_reads(self.sharp, reads)
        self.own = self.sharp.again()
        _log_reads(self.own, reads)
        most = max(candidates(call.module, lambda: iter(())), default=0)
        if most < 2:
            raise NoExperts("nothing tells how many experts there are", stage="read")
        ((name, spec),) = call.tensors.items()
        rank = len(spec.shape) - 1
        most = min(most, 512)  # each of few experts is to get two tokens and more, also where a token has one expert only
        self.lead = primes(max(most + 1, -(-max(4 * most, min(16 * most, 256)) // 5 ** (rank - 1))), self.own.sizes(), rank)
        self.primes = {p: f"{name}.shape[{d}]" for d, p in enumerate(self.lead)}

    def record(self) -> fx.GraphModule:
        try:
            gm = record_symbolically(self.call.fn, [self.own.arguments(self.lead) for _ in range(2)], self.own.probe)
        except Rejection as r:  # any function with a loop may come here: what cannot be read need not be about experts
            raise NoExperts(r.reason, stage="read") from r
        if not gm.meta["host_reads"] and not self._counts_rows(gm):
            raise NoExperts("nothing in its control flow depends on data", stage="read")
        return gm

    def _counts_rows(self, gm: fx.GraphModule) -> bool:
        """Whether the code asks how many rows an expert got (`if token.numel() > 0`), which no operation tells."""
        picks = any(torch.Tag.dynamic_output_shape in getattr(n.target, "tags", ()) for n in gm.graph.nodes)
        return picks and bool(_COUNTS & set(self.call.fn.__code__.co_names))

    def trials(self, b: BlockBench) -> Iterator[tuple[str, dict[str, Any]]]:
        *first, last = self.lead
        yield "other tokens", b.arguments([*(p + 1 for p in first), last + 4])
        yield "few experts", b.arguments(self.lead, alike=True)
        yield "one token", b.arguments([1] * len(self.lead))
        many = _affordable(b, 8)
        if many > self.lead[-1]:
            yield "many tokens", b.arguments([*(1 for _ in first), many], alike=True)

    def optional(self, b: BlockBench) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from ()

    def twice(self, b: BlockBench) -> dict[str, Any] | None:
        return None

    def usual(self, b: BlockBench) -> dict[str, Any]:
        return b.arguments(self.lead)


def _affordable(bench: Bench, k: int) -> int:
    """Tokens that k experts each can work on in a moment, at most 2048: multiplications count. Code that compares numbers is worth more."""
    work = sum(w.numel() // (w.shape[0] if w.ndim > 2 else 1) for w in bench.weights() if w.ndim > 1)
    return max(_FEWEST if _compares(bench.call.fn.__code__) else 0, min(_MANY, _WORK // max(1, k * work)))


def _compares(code: types.CodeType) -> bool:
    """Whether code asks which of two numbers is larger, but for 0 and 1: a number of rows may be one of them."""
    before = None
    for i in dis.get_instructions(code):
        small = before is not None and before.opname == "LOAD_CONST" and before.argval in (0, 1)
        if i.opname == "COMPARE_OP" and i.argrepr[:1] in ("<", ">") and not small:
            return True
        if i.opname == "LOAD_GLOBAL" and i.argval in ("min", "max"):
            return True
        before = i
    return any(_compares(c) for c in code.co_consts if isinstance(c, types.CodeType))


def _log_reads(bench: Bench, reads: set[tuple[str, str]]) -> None:
    if bench.probe is not None:
        bench.probe.reads = reads


# ---- confirmation ------------------------------------------------------------------------------------------------------


def _confirm(written: Regenerated, reader: Any) -> None:
    """The user's function against ours on inputs that the recording never saw. Raises `Rejection` where they differ."""
    sharp, own, call = reader.sharp, reader.own, reader.call
    for name, arguments in reader.trials(sharp):
        _compare(written, sharp, arguments, name)
    for name, arguments in reader.optional(sharp):
        _compare(written, sharp, arguments, name, may_raise=True)
    if call.grad:
        _compare_gradients(written, sharp, reader.usual(sharp))
    bench = own if call.device.type in ("cpu", "meta") else own.again(device=call.device)
    _compare(written, bench, reader.usual(bench), f"{bench.device.type} in its own types", call.autocast)


def _holds_for_repeats(written: Regenerated, reader: Any) -> bool:
    """Whether an expert that a token has twice counts twice in the user's function, as it does in ours."""
    arguments = reader.twice(reader.sharp)
    if arguments is None:
        return True
    try:
        _compare(written, reader.sharp, arguments, "an expert twice")
    except Rejection:
        return False
    return True


def _given(written: Regenerated, bench: Bench, arguments: Mapping[str, Any]) -> list[Any]:
    params = [] if bench.probe is None else [bench.probe.tensors[p] for p in written.params]
    return [*arguments.values(), *params]


def _compare(
    written: Regenerated,
    bench: Bench,
    arguments: Mapping[str, Any],
    what: str,
    autocast: torch.dtype | None = None,
    may_raise: bool = False,
) -> None:
    """Raise `Rejection` unless all results agree row by row; `may_raise`: the function may refuse these arguments."""
    try:
        expected = bench.run(arguments, autocast)
    except Rejection:
        raise
    except Exception as e:
        if may_raise:
            return
        raise Rejection(f"it fails on {what}: {type(e).__name__}: {str(e)[:200]}", stage="confirm") from e
    with torch.autocast(bench.device.type, dtype=autocast, enabled=autocast is not None):
        got = written.by_oracle(*_given(written, bench, arguments))
    if not _same_results(got, expected, autocast, f32=bench.dtype is torch.float32):
        raise Rejection(f"what was read does not hold for {what}", stage="confirm")
    _check_shapes(written, bench, arguments, expected)


def _same_results(got: Any, expected: Any, autocast: torch.dtype | None, f32: bool) -> bool:
    a, how_a = pytree.tree_flatten(got)
    b, how_b = pytree.tree_flatten(expected)
    if how_a != how_b:
        return False
    for x, y in zip(a, b, strict=True):
        if not isinstance(y, Tensor):
            if x != y:
                return False
        elif not isinstance(x, Tensor) or x.dtype != y.dtype or x.shape != y.shape:
            return False
        elif not y.is_floating_point():
            if not torch.equal(x, y):
                return False
        elif not _agree(x, y, _TOLERANCE[torch.float32 if f32 else autocast or y.dtype]):
            return False
    return True


def _compare_gradients(written: Regenerated, bench: Bench, arguments: Mapping[str, Any]) -> None:
    """Raise `Rejection` unless the gradients to all float arguments agree (to small parameters too)."""
    params = [] if bench.probe is None else [bench.probe.tensors[p] for p in written.params]
    leaves = [t for t in (*arguments.values(), *(params if sum(p.numel() for p in params) <= _SMALL else ())) if _is_float(t)]
    for t in leaves:
        t.requires_grad_(True)
    try:
        results = bench.run(arguments), written.by_oracle(*_given(written, bench, arguments))
        both = [[t for t in pytree.tree_leaves(r) if _is_float(t) and t.requires_grad] for r in results]
        cotangents = [torch.randn(t.shape, generator=bench.generator).to(t.device, t.dtype) for t in both[1]]
        if [t.shape for t in both[0]] != [t.shape for t in both[1]]:
            raise Rejection("its results have other gradients than what was read", stage="confirm")
        found = [torch.autograd.grad(ts, leaves, cotangents, allow_unused=True) if ts else [None] * len(leaves) for ts in both]
    finally:
        for t in leaves:
            t.requires_grad_(False)
    for t, x, y in zip(leaves, *found, strict=True):
        zero = torch.zeros_like(t)
        if not _agree(zero if x is None else x, zero if y is None else y, 1e-4):
            raise Rejection("its gradients are not those of what was read", stage="confirm")


def _is_float(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _check_shapes(written: Regenerated, bench: Bench, arguments: Mapping[str, Any], expected: Any) -> None:
    """Raise `Rejection` unless the function with the op itself gives results of the same shapes and types, on the meta device."""
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in _given(written, bench, arguments)]
    got = pytree.tree_leaves(written.by_op(*meta))
    for x, y in zip(got, pytree.tree_leaves(expected), strict=True):
        if isinstance(y, Tensor) and (x.shape != y.shape or (x.dtype != y.dtype and written.call.autocast is None)):
            raise Rejection(f"its result is {list(y.shape)} {y.dtype}, ours would be {list(x.shape)} {x.dtype}", stage="confirm")


def _agree(a: Tensor, b: Tensor, tol: float) -> bool:
    """Rows of a and b within `tol` of the row's largest entry (rows of nothing: of the whole)."""
    a, b = (t.detach().to("cpu", torch.float64).reshape(-1, t.shape[-1] if t.ndim else 1) for t in (a, b))
    if a.shape != b.shape or not bool(torch.isfinite(a).all()):
        return False
    size = b.abs().amax(-1)
    floor = tol * 1e-3 * size.max() if size.numel() else 0.0
    return bool(((a - b).abs().amax(-1) <= tol * size + floor).all())


def matches(trial: Trial, module: nn.Module | None) -> bool:
    """A trial holds for another module if that answers everything the function asked in the same way."""
    return module is None or all(fingerprint(module, *r) == p for r, p in trial.reads.items())
