"""A bench to try a user's function on: the call as seen, what its arguments are, and probes for routings of every kind."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, nn

from .ir import Rejection
from .passes.probe import Probe, Windows, candidates
from .passes.record import neutral

BATCH = 3


class NoExperts(Rejection):
    """The function's ids choose nothing: no expert loop at all, so nobody wants to hear of it."""


class Spec(NamedTuple):
    """A tensor argument: sizes are ints, or expressions where they are dynamic."""

    dtype: torch.dtype
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """One call seen while tracing: `fn(module, ...)` (or `fn(...)`), its tensors and its other arguments by name."""

    fn: types.FunctionType
    module: nn.Module | None
    tensors: Mapping[str, Spec]
    constants: Mapping[str, Any]
    device: torch.device
    autocast: torch.dtype | None = None

    @property
    def source(self) -> str:
        return f"{self.fn.__code__.co_filename}:{self.fn.__code__.co_firstlineno}"


class Roles(NamedTuple):
    """Which argument is what: tokens [.., H], ids [T, k] or [T*k], weights of as many elements, and the weights handed in."""

    tokens: str
    ids: str
    weights: str
    params: tuple[str, ...]
    k: int


def roles_of(tensors: Mapping[str, Spec]) -> Roles | None:
    """The only way to see these arguments as a dispatch, or None."""
    found = []
    floats = {n: s for n, s in tensors.items() if s.dtype.is_floating_point and s.shape}
    for ids, spec in tensors.items():
        if spec.dtype not in (torch.int64, torch.int32) or not 1 <= len(spec.shape) <= 2:
            continue
        for tokens, x in floats.items():
            k = _per_token(x, spec)
            if k is None:
                continue
            for w, s in floats.items():
                if w != tokens and s.shape in (spec.shape, (*spec.shape, 1)):
                    rest = tuple(n for n in tensors if n not in (tokens, ids, w))
                    found.append(Roles(tokens, ids, w, rest, k))
    if len(found) != 1 or any(n not in floats or len(floats[n].shape) < 2 for n in found[0].params):
        return None
    return found[0]


def _per_token(x: Spec, ids: Spec) -> int | None:
    """k, if `x` [.., H] holds the tokens that `ids` is for."""
    if not 2 <= len(x.shape) <= 3 or not isinstance(x.shape[-1], int):
        return None
    rows = sympy.Mul(*x.shape[:-1])
    if len(ids.shape) == 2:
        return ids.shape[1] if isinstance(ids.shape[1], int) and sympy.expand(rows - ids.shape[0]) == 0 else None
    k = sympy.cancel(sympy.sympify(ids.shape[0]) / rows)
    return int(k) if k.is_Integer and k >= 1 else None


class Bench:
    """Everything to run a call's function with: a probe module, the weights handed in, and routings."""

    def __init__(self, call: Call, roles: Roles, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        self.call, self.roles, self.dtype = call, roles, dtype
        self.device = device or torch.device("cpu")
        self.generator = torch.Generator().manual_seed(20)
        self.probe = None if call.module is None else Probe(call.module, self.device, dtype=dtype)
        windows = Windows(self.device, self.generator, 0.2)
        self.given = {n: windows.take(call.tensors[n].shape, dtype or call.tensors[n].dtype) for n in roles.params}

    def arguments(self, ids: Tensor) -> dict[str, Any]:
        """Call arguments for a routing ids [T, k]: tokens of several sizes, routing weights of both signs."""
        r, t = self.roles, self.call.tensors
        x = torch.randn(ids.shape[0], t[r.tokens].shape[-1], generator=self.generator)
        x = x * torch.tensor([0.25, 1.0, 4.0, 32.0])[torch.arange(ids.shape[0]) % 4, None]
        w = torch.rand(ids.shape, generator=self.generator) * 1.5 - 0.25
        if len(t[r.tokens].shape) == 3:
            batch = BATCH if ids.shape[0] % BATCH == 0 else 1
            x = x.view(batch, -1, x.shape[-1])
        if len(t[r.ids].shape) == 1:
            ids, w = ids.reshape(-1), w.reshape(-1)
        if len(t[r.weights].shape) > ids.ndim:
            w = w.unsqueeze(-1)
        made = {
            r.tokens: x.to(self.device, self.dtype or t[r.tokens].dtype),
            r.ids: ids.to(self.device, t[r.ids].dtype),
            r.weights: w.to(self.device, self.dtype or t[r.weights].dtype),
            **self.given,
        }
        return {n: made[n] if n in made else self.call.constants[n] for n in (*t, *self.call.constants)}

    def run(self, arguments: Mapping[str, Any], autocast: torch.dtype | None = None) -> Any:
        """The user's function on these arguments; what it raises comes through. Raises `Rejection` for side effects."""
        with neutral(), torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None):
            out = self.call.fn(*(() if self.probe is None else (self.probe.module,)), **arguments)
        if self.probe is not None:
            self.probe.check_unchanged()
        return out

    def routing(self, tokens: int, experts: Sequence[int] | range) -> Tensor:
        """ids [tokens, k], distinct in each row, that hit each of `experts` if tokens * k >= len(experts)."""
        k, pool = self.roles.k, torch.tensor(list(experts))
        order = torch.cat([pool[torch.randperm(len(pool), generator=self.generator)] for _ in range(-(-tokens * k // len(pool)))])
        ids = order[: tokens * k].view(tokens, k)
        for row in ids:  # where two shuffles meet, a row may hold an expert twice
            if len(row.unique()) < k:
                others = pool[~torch.isin(pool, row)]
                twice = torch.tensor([i for i in range(k) if row[i] in row[:i]])
                row[twice] = others[torch.randperm(len(others), generator=self.generator)[: len(twice)]]
        return ids


def token_count(experts: int, k: int, taken: set[int]) -> int:
    """A prime number of tokens: enough for each expert to be hit twice on average, and no size that occurs elsewhere."""
    n = max(17, -(-2 * experts // k))
    while not sympy.isprime(n) or taken & {n, n * k, n * BATCH, n * BATCH * k}:
        n += 1
    return n


def number_of_experts(bench: Bench) -> int:
    """The largest candidate N such that id N - 1 is legal and contributes. Raises `NoExperts` if there is none."""
    k = bench.roles.k

    def weights() -> Any:
        yield from bench.given.values()
        yield from bench.probe.tensors.values() if bench.probe is not None else ()

    for n in candidates(bench.call.module, weights):
        others = [e for e in range(n - 1)][: k - 1]
        if len(others) < k - 1:
            continue
        args = bench.arguments(torch.tensor([[n - 1, *others]] * BATCH))
        w = args[bench.roles.weights]
        outs = []
        for size in (1.0, 2.0):
            first = torch.zeros(BATCH, k, dtype=w.dtype)
            first[:, 0] = size
            args[bench.roles.weights] = first.view_as(w)
            try:
                out = bench.run(args)
            except Rejection:
                raise
            except Exception:  # an id out of range; what is raised then is the function's own affair
                break
            if not isinstance(out, Tensor):
                raise Rejection("it returns something else than one tensor", stage="read")
            outs.append(out)
        if len(outs) == 2 and not torch.equal(*outs):
            return n
    raise NoExperts("no argument or parameter tells how many experts there are", stage="read")


def bind(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments by name, or None where the call does not fit or the function takes any number of them."""
    try:
        signature = inspect.signature(fn)
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY) for p in signature.parameters.values()):
            return None
        return dict(signature.bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return None
