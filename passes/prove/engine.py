"""The proof: claims about regions, run on probes in float64. The only home of sizes, memo, tolerance and trouble.

A claim says that what a region computes is what somebody means by it. Agreement to 1e-7 in float64 means the same function and not a
tolerance. Every claim is tried with small sizes first; where the region cannot run with them, with others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ...ir import Rejection
from .. import terms as T
from ..aten import names
from ..aten.names import op_name
from ..aten.sources import code_of, source_of
from . import probe
from .edge import Edge, Small
from .literals import Literals
from .region import TROUBLE, Region, TooMuchWork, Work, one_thread
from .sizes import SMALL, Script, Sizes, Unfree

TOLERANCE = 1e-7
WORK = 1_000_000_000  # multiplications that one claim may take, and elements it may touch
_ATTEMPTS = 12  # choices of sizes and readings of numbers
_KEPT = 4096

_proved: dict[Any, tuple[str, str] | None] = {}


class Differs(Exception):
    """Where a comparison ends: what is other than meant."""

    code = "differs"


class OtherGradients(Differs):
    code = "gradients"


@dataclass(frozen=True)
class Env:
    """What everything is on one probe: values of the region's nodes and of its edge; the parameters and experts in the probe's sizes."""

    values: Mapping[fx.Node, Any]
    small: Small

    def __getitem__(self, n: fx.Node) -> Tensor:
        value: Tensor = self.values[n]
        return value


@dataclass(frozen=True)
class Claim:
    """These outputs of these nodes are this meaning.

    `seen(env)` and `meant(env)`: what the graph says and what is meant, in one shape, with their gradients; either may raise `Differs`.
    `key`: all that `meant` depends on beside the region. `kinds`: probes to run on. `leaves`: what wants a gradient, compared too.
    `no_grad`: nodes that run without gradient.
    """

    part: str
    says: str
    edge: Edge
    region: Region
    seen: Callable[[Env], Tensor]
    meant: Callable[[Env], Tensor]
    key: Any
    kinds: tuple[probe.Kind, ...]
    leaves: tuple[fx.Node, ...] = ()
    no_grad: frozenset[fx.Node] = field(default=frozenset())


def prove(claims: Iterable[Claim], at: fx.Node) -> Rejection | None:
    """None when all claims hold; else the first that does not, as a rejection at a node. Equal claims are run once a process."""
    for claim in claims:
        numbers = claim.region.number
        gradients = (tuple(numbers[n] for n in claim.leaves), frozenset(numbers[n] for n in claim.no_grad))
        key = (claim.part, claim.key, claim.region.signature, gradients, claim.kinds)
        if key not in _proved:
            if len(_proved) > _KEPT:
                _proved.clear()
            with one_thread():
                _proved[key] = _problem(claim)
        problem = _proved[key]
        if problem is not None:
            code, text = problem
            text += _stopped(claim) if code == OtherGradients.code else ""
            return Rejection(f"{claim.says}: {text}", at, "validate", code=code, part=claim.part)
    return None


def _stopped(claim: Claim) -> str:
    """Where a gradient is stopped in the region, as its user wrote it."""
    stops = [n for n in claim.region.nodes if op_name(n) in names.STOP_GRADIENT and source_of(n)]
    if stops:
        return f": `{code_of(stops[0]) or op_name(stops[0])}` at {source_of(stops[0])} stops them"
    return ": a part of it runs under no_grad" if claim.no_grad else ""


def forget() -> None:
    """Prove everything anew."""
    _proved.clear()


def _problem(claim: Claim) -> tuple[str, str] | None:
    """(code, what is wrong) of a claim that does not hold."""
    found: tuple[str, str] | None = None
    work = Work(WORK)
    attempts = _Attempts(claim.edge.first_sizes())
    for literals in attempts:
        T.look()
        try:
            small = claim.edge.small(literals.sizes)
            for turn, kind in enumerate(claim.kinds):
                _try(claim, small, literals, kind, turn, work)
            return None
        except Differs as e:
            found = found if found is not None and found[0] in (Differs.code, OtherGradients.code) else (e.code, str(e))
            attempts.failed(None)
        except TooMuchWork:
            return ("budget", _too_much(found, literals.sizes))
        except Unfree as e:
            attempts.failed(e)
            found = found or ("trouble", str(e))
        except TROUBLE as e:
            attempts.failed(None, trouble=True)
            found = found or ("trouble", f"it could not be run on probing inputs ({type(e).__name__}: {(str(e).splitlines() or [''])[0]})")
    return found


def _too_much(found: tuple[str, str] | None, sizes: Sizes) -> str:
    """Why a proof is given up: the sizes that stayed as they are, and what came of smaller ones."""
    stayed = [str(a) for a, b in sizes.atoms if a == b > SMALL]
    which = f"with {', '.join(stayed)} as they are" if stayed else "some of its sizes cannot be reduced"
    before = f"{found[1]} in smaller sizes; " if found is not None and stayed else ""
    return f"{before}the proof takes more work than any block is worth: {which}"


class _Attempts:
    """Sizes and readings of numbers, one after the other, as long as the last ones failed."""

    def __init__(self, first: Sizes) -> None:
        self.sizes: Sizes | None = first
        self.waiting: list[Script] = [Script()]
        self.tried: list[dict[Any, int]] = []
        self.now = Literals(first, Script())
        self.left = _ATTEMPTS

    def __iter__(self) -> Iterator[Literals]:
        while self.sizes is not None and self.waiting and self.left:
            self.left -= 1
            script = self.waiting.pop(0)
            self.now = Literals(self.sizes, script)
            yield self.now

    def failed(self, e: Unfree | None, trouble: bool = False) -> None:
        """Other readings of the numbers first; where there are none, and the region could not run, other sizes.

        The last attempt of a region that could not run is at the graph's own sizes, where every number is what it says.
        """
        assert self.sizes is not None
        self.tried.append(dict(self.now.script.chosen))
        known = [*self.tried, *(s.chosen for s in self.waiting)]
        self.waiting += [s for s in self.now.script.others(_ATTEMPTS // 2) if s.chosen not in known]
        if e is not None or trouble and (not self.waiting or self.left == 1):
            self.sizes = self.sizes.without(e) if e is not None else self.sizes.as_traced()
            self.waiting, self.tried = [Script()], []


def _try(claim: Claim, small: Small, literals: Literals, kind: probe.Kind, turn: int, work: Work) -> None:
    """One probe. Raises Differs where graph and meaning do not agree."""
    work.spend(probe.effort(small, claim.region.edge))
    given = probe.values(claim.edge, small, claim.region.edge, kind, turn)
    try:
        with torch.no_grad():
            env = Env(claim.region.run(given, literals, work), small)
    except TROUBLE:
        if kind.may_fail:
            return
        raise
    with torch.no_grad():
        seen, meant = claim.seen(env), claim.meant(env)
    difference = different(seen, meant)
    if difference is not None:
        raise Differs(f"{difference} on probe {turn} ({kind.name})")
    if kind.zeros and claim.leaves:
        _same_gradients(claim, given, small, literals, work)


def different(seen: Tensor, meant: Tensor) -> str | None:
    """None when equal up to rounding in float64."""
    if not meant.numel():
        return None
    size = max(float(meant.abs().max()), 1e-30)
    diff = float((seen.reshape(meant.shape) - meant).abs().max())
    return None if diff <= TOLERANCE * size else f"relative difference {diff / size:.1e}"


def _same_gradients(claim: Claim, given: Mapping[fx.Node, Any], small: Small, literals: Literals, work: Work) -> None:
    """Raise Differs unless both sides have the same gradient for every leaf."""
    edge = claim.edge
    inputs = {n: given[n].clone().requires_grad_() for n in claim.leaves if n not in edge.twins}
    with torch.enable_grad():
        start = {**given, **{n: v.clone() for n, v in inputs.items()}}
        start.update({n: start[o].reshape(small.shapes[n]) for n, o in edge.twins.items() if n in given})
        env = Env(claim.region.run(start, literals, work, claim.no_grad), small)
        seen, meant = claim.seen(env), claim.meant(env)
        along = torch.randn(meant.shape, generator=torch.Generator().manual_seed(1), dtype=meant.dtype)
        both = [_gradients((r.reshape(meant.shape) * along).sum(), list(inputs.values())) for r in (seen, meant)]
    for mine, theirs in zip(*both, strict=True):
        size = max(float(g.abs().max()) for g in (mine, theirs)) if theirs.numel() else 0.0
        if not torch.allclose(mine, theirs, rtol=0.0, atol=10 * TOLERANCE * size, equal_nan=True):
            raise OtherGradients("other gradients")


def _gradients(y: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(y, leaves, allow_unused=True) if y.requires_grad else [None] * len(leaves)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
