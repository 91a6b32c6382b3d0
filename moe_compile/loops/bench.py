"""A bench to try a user's function on: the call as seen, what its arguments are, and probes for routings of every kind."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import sympy
import torch
from torch import Tensor, nn

from ..ir import Rejection
from .probe import Probe, Windows, candidates
from .record import neutral


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
    grad: bool = True

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
    """A call's function on a probe module: made for one element type and device, run on arguments of any token count."""

    def __init__(self, call: Call, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        self.call, self.dtype = call, dtype
        self.device = device or torch.device("cpu")
        self.generator = torch.Generator().manual_seed(20)
        self.probe = None if call.module is None else Probe(call.module, self.device, dtype=dtype)

    def again(self, **kw: Any) -> Self:
        """The same bench for another element type or device."""
        return type(self)(self.call, **kw)

    def run(self, arguments: Mapping[str, Any], autocast: torch.dtype | None = None) -> Any:
        """The user's function on these arguments; what it raises comes through. Raises `Rejection` for side effects."""
        with neutral(), torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None):
            out = self.call.fn(*(() if self.probe is None else (self.probe.module,)), **arguments)
        if self.probe is not None:
            self.probe.check_unchanged()
        return out

    def weights(self) -> Iterator[Tensor]:
        """Every tensor that may hold parameters."""
        yield from self.probe.tensors.values() if self.probe is not None else ()

    def sizes(self) -> set[int]:
        """Every size and number around, but for the token counts."""
        found = {d for w in self.weights() for d in w.shape}
        found |= {d for s in self.call.tensors.values() for d in s.shape[-1:] if isinstance(d, int)}
        return found | {v for m in (self.call.module.modules() if self.call.module else ()) for v in vars(m).values() if type(v) is int}

    def rows(self, lead: Sequence[int], spec: Spec) -> Tensor:
        """Tokens [*lead, H] of several magnitudes."""
        x = torch.randn(*lead, spec.shape[-1], generator=self.generator)
        x = x * torch.tensor([0.25, 1.0, 4.0, 32.0])[torch.arange(x[..., 0].numel()) % 4].view(*lead, 1)
        return x.to(self.device, self.dtype or spec.dtype)

    def complete(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments in the call's order."""
        return {n: made[n] if n in made else self.call.constants[n] for n in (*self.call.tensors, *self.call.constants)}


class BlockBench(Bench):
    """For functions of tokens alone, with the router inside."""

    def arguments(self, lead: Sequence[int], alike: bool = False) -> dict[str, Any]:
        """Arguments for tokens [*lead, H]; `alike`: all tokens nearly the same, so that few experts are chosen."""
        ((name, spec),) = self.call.tensors.items()
        x = self.rows(lead, spec)
        if alike:
            x = x.flatten()[: x.shape[-1]] + x * 1e-3
        return self.complete({name: x})


class DispatchBench(Bench):
    """For functions of tokens, ids and routing weights."""

    def __init__(self, call: Call, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        super().__init__(call, dtype, device)
        roles = roles_of(call.tensors)
        assert roles is not None
        self.roles = roles
        windows = Windows(self.device, self.generator, 0.2)
        self.given = {n: windows.take(call.tensors[n].shape, dtype or call.tensors[n].dtype) for n in roles.params}

    def weights(self) -> Iterator[Tensor]:
        yield from self.given.values()
        yield from super().weights()

    def arguments(self, ids: Tensor, lead: Sequence[int] | None = None) -> dict[str, Any]:
        """Arguments for a routing ids [T, k] of tokens [*lead, H]: routing weights of both signs."""
        r, t = self.roles, self.call.tensors
        if lead is None:
            lead = [1] * (len(t[r.tokens].shape) - 2) + [ids.shape[0]]
        w = torch.rand(ids.shape, generator=self.generator) * 1.5 - 0.25
        made = {
            r.tokens: self.rows(lead, t[r.tokens]),
            r.ids: (ids.reshape(-1) if len(t[r.ids].shape) == 1 else ids).to(self.device, t[r.ids].dtype),
            **self.given,
        }
        w = w.view(*made[r.ids].shape, *[1] * (len(t[r.weights].shape) - made[r.ids].ndim))
        made[r.weights] = w.to(self.device, self.dtype or t[r.weights].dtype)
        return self.complete(made)

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


def primes(least: int, taken: set[int], count: int = 1) -> list[int]:
    """Different primes that divide no number in `taken`: the last is at least `least`, the others are small."""
    found: list[int] = []
    n = 5
    while len(found) < count:
        n = max(n, least) if len(found) == count - 1 else n
        if sympy.isprime(n) and not any(v % n == 0 for v in taken if v):
            found.append(n)
        n += 1
    return found


def number_of_experts(bench: DispatchBench) -> int:
    """The largest candidate N such that id N - 1 is legal and contributes. Raises `NoExperts` if there is none."""
    k, tokens = bench.roles.k, 3
    for n in candidates(bench.call.module, bench.weights):
        others = list(range(n - 1))[: k - 1]
        if len(others) < k - 1:
            continue
        args = bench.arguments(torch.tensor([[n - 1, *others]] * tokens))
        w = args[bench.roles.weights]
        outs = []
        for size in (1.0, 2.0):
            first = torch.zeros(tokens, k, dtype=w.dtype)
            first[:, 0] = size
            try:
                out = bench.run({**args, bench.roles.weights: first.view_as(w)})
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
