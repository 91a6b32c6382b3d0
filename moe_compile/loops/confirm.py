"""What was read against the user's function itself, on inputs that the recording never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir import Rejection
from ..passes.aten.node import reached
from .bench import Bench
from .neutral import neutral
from .regenerate import Regenerated

_TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_NEAR = {torch.float16: 2**-10, torch.bfloat16: 2**-7}  # how far off what is rounded to few bits may be: two units in the last place
_SMALL = 1 << 22  # parameter elements up to which their gradients are compared too
_FAR = {torch.float16: 2.0**5}  # by how much larger numbers are where a function of the user's says its gradients itself: 2^20 otherwise


def confirm(written: Regenerated, as_read: Regenerated, reader: Any) -> None:
    """The user's function against ours on inputs that the recording never saw. Raises `Rejection` where they differ.

    as_read: as wide as the recording was. Where that is not as wide as the experts are, all routings are tried on narrow ones. On the
    real ones it is one routing to a few experts, and that all of them run the same operations; where that is not certain, one to all.
    """
    small, own, call = reader.small, reader.own, reader.call
    for name, arguments in reader.trials(small):
        _compare(as_read, small, arguments, name)
    for name, arguments in reader.optional(small):
        _compare(as_read, small, arguments, name, may_raise=True)
    if call.grad:
        _compare_gradients(as_read, small, reader.usual(small))
    if as_read is not written:
        _compare(written, reader.sharp, reader.spot(reader.sharp), "its real widths")
        if not reader.same_program():
            _compare(written, reader.sharp, reader.usual(reader.sharp), "all experts at their real widths")
    device = call.device if call.device.type not in ("cpu", "meta") else own.device
    bench = own if device == own.device and not reader.whole() else own.again(device=device, fewer=reader.whole())
    _compare(as_read, bench, reader.usual(bench), f"{bench.device.type} in its own types", call.autocast)


def holds_for_repeats(written: Regenerated, reader: Any) -> bool:
    """Whether an expert that a token has twice counts twice in the user's function, as it does in ours."""
    arguments = reader.twice(reader.small)
    if arguments is None:
        return True
    try:
        _compare(written, reader.small, arguments, "an expert twice")
    except Rejection:
        return False
    return True


def _given(written: Regenerated, bench: Bench, arguments: Mapping[str, Any]) -> list[Any]:
    params = [bench.probe.tensors[p] for p in written.params]
    return [*arguments.values(), *params]


def _compare(
    written: Regenerated,
    bench: Bench,
    arguments: Mapping[str, Any],
    what: str,
    autocast: torch.dtype | None = None,
    may_raise: bool = False,
) -> None:
    """Raise `Rejection` unless all results agree row by row; `may_raise`: the function may refuse these arguments.

    A recording has types by name where code has ``w.to(x.dtype)``: where that tells in wider types, names stand for wider ones.
    """
    try:
        _compare_once(written, bench, arguments, what, autocast, may_raise)
    except (Rejection, RuntimeError) as e:
        if isinstance(e, Rejection) and e.stage != "confirm" or not bench.widen():
            raise
        _compare_once(written, bench, arguments, what, autocast, may_raise)


def _compare_once(
    written: Regenerated, bench: Bench, arguments: Mapping[str, Any], what: str, autocast: torch.dtype | None, may_raise: bool
) -> None:
    try:
        expected = bench.run(arguments, autocast)
    except Rejection:
        raise
    except Exception as e:
        if may_raise:
            return
        raise Rejection(f"it fails on {what}: {type(e).__name__}: {str(e)[:200]}", stage="confirm") from e
    cast = torch.autocast(bench.device.type, dtype=autocast, enabled=autocast is not None)

    def ours(fn: Any) -> Any:
        with neutral(bench.call.grad, noting=False), cast, bench.types():
            return fn(*_given(written, bench, arguments))

    got = ours(written.by_oracle)
    steps, coarse = written.experts.rounded, torch.float32 if bench.dtype is torch.float32 else autocast
    coarse = torch.bfloat16 if steps and _in_half(written) else coarse
    if not _same_results(got, expected, coarse):
        near = _near(got, coarse) if steps else 0.0
        moved = [ours(written.moved(near, way)) for way in (-1.0, 1.0) if near]
        if not moved or not _same_results(got, expected, coarse, moved):
            raise Rejection(f"what was read does not hold for {what}", stage="confirm")
    _check_shapes(written, bench, arguments, expected)


def _in_half(written: Regenerated) -> bool:
    """Whether a product gives its results in half precision whatever its rows are in, as `scaled_mm` does."""
    values = (n.meta.get("val") for n in written.gm.graph.nodes if n.op == "call_function")
    return any(isinstance(v, Tensor) and v.dtype in (torch.bfloat16, torch.float16) for v in values)


def _near(results: Any, computed: torch.dtype | None) -> float:
    """How far off, of its own size, may be what is rounded to few bits."""
    own = (t.dtype for t in pytree.tree_leaves(results) if _is_float(t))
    return max((_NEAR.get(computed or t, _TOLERANCE[torch.float32]) for t in own), default=0.0)


def _same_results(got: Any, expected: Any, computed: torch.dtype | None, moved: Sequence[Any] = ()) -> bool:
    """`computed`: the type that products are computed in, None for that of the results. moved: results where codes of rows are others, as
    far from `got` as they may be."""
    a, how_a = pytree.tree_flatten(got)
    b, how_b = pytree.tree_flatten(expected)
    if how_a != how_b:
        return False
    others = [pytree.tree_leaves(m) for m in moved]
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if not isinstance(y, Tensor):
            if x != y:
                return False
        elif not isinstance(x, Tensor) or x.dtype != y.dtype or x.shape != y.shape:
            return False
        elif not y.is_floating_point():
            if not torch.equal(x, y):
                return False
        elif not _agree(x, y, _TOLERANCE[computed or y.dtype], [m[i] for m in others]):
            return False
    return True


def _compare_gradients(written: Regenerated, bench: Bench, arguments: Mapping[str, Any]) -> None:
    """Raise `Rejection` unless the gradients to all float arguments agree (to small parameters too).

    An autograd.Function may have others for large numbers alone: one that clips them, or passes what its forward pass clamps. Such are
    compared there too.
    """
    if not _compare_gradients_once(written, bench, arguments):
        return
    far = _FAR.get(bench.dtype, 2.0**20)
    for wide, out in ((1.0, far), (1.0, 1 / far), (far, 1.0)):
        _compare_gradients_once(written, bench, {k: t * wide if _is_float(t) else t for k, t in arguments.items()}, out, _SMALL << 6)


def _compare_gradients_once(
    written: Regenerated, bench: Bench, arguments: Mapping[str, Any], size: float = 1.0, small: int = _SMALL
) -> bool:
    """Whether the user's function has an autograd.Function. size: of the gradients of its results."""
    params = [bench.probe.tensors[p] for p in written.params]
    leaves = [t for t in (*arguments.values(), *(params if sum(p.numel() for p in params) <= small else ())) if _is_float(t)]
    for t in leaves:
        t.requires_grad_(True)
    try:
        theirs = bench.run(arguments)
        with bench.types():
            results = theirs, written.by_oracle(*_given(written, bench, arguments))
        both = [[t for t in pytree.tree_leaves(r) if _is_float(t) and t.requires_grad] for r in results]
        own = _has_own(both[0])
        cotangents = [(torch.randn(t.shape, generator=bench.generator) * size).to(t.device, t.dtype) for t in both[1]]
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
    return own


def _has_own(results: Sequence[Tensor]) -> bool:
    """Whether an autograd.Function is among what results were made by."""
    made = reached([t.grad_fn for t in results if t.grad_fn is not None], lambda f: [g for g, _ in f.next_functions if g is not None])
    return any(isinstance(f, torch.autograd.function.BackwardCFunction) for f in made)


def _is_float(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _check_shapes(written: Regenerated, bench: Bench, arguments: Mapping[str, Any], expected: Any) -> None:
    """Raise `Rejection` unless the function with the op itself gives results of the same shapes and types, on the meta device."""
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in _given(written, bench, arguments)]
    with bench.types():  # as the results that are expected
        got = pytree.tree_leaves(written.by_op(*meta))
    for x, y in zip(got, pytree.tree_leaves(expected), strict=True):
        if isinstance(y, Tensor) and (x.shape != y.shape or (x.dtype != y.dtype and written.call.autocast is None)):
            raise Rejection(f"its result is {list(y.shape)} {y.dtype}, ours would be {list(x.shape)} {x.dtype}", stage="confirm")


def _agree(a: Tensor, b: Tensor, tol: float, moved: Sequence[Tensor] = ()) -> bool:
    """Rows of a and b within `tol` of the row's largest entry (rows of nothing: of the whole).

    moved: what `a` is where codes of rows that lie at an edge are on its other side; numbers may be as far off as that.
    """
    a, b, *ends = (t.detach().to("cpu", torch.float64).reshape(-1, t.shape[-1] if t.ndim else 1) for t in (a, b, *moved))
    if a.shape != b.shape or not all(bool(torch.isfinite(t).all()) for t in (a, b, *ends)):  # infinite bounds would allow anything
        return False
    size = b.abs().amax(-1)
    floor = tol * 1e-3 * size.max() if size.numel() else 0.0
    off = (a - b).abs()
    if ends:
        off = off - torch.stack([(e - a).abs() for e in ends]).amax(0)
    return bool((off.amax(-1) <= tol * size + floor).all())
