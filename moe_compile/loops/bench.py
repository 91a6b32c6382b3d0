"""A bench to try a user's function on: probes for its module and its tensors, for routings of every kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import sympy
import torch
from torch import Tensor

from ..ir import Rejection
from .call import Call, Roles, Spec
from .fewer import Fewer
from .narrow import narrow
from .neutral import neutral
from .places import Place
from .probe import CONTAINERS, Probe, Windows, candidates, wider
from .rows import UNEVEN, Listener
from .sealed import containers
from .widened import Widened

_HALF = {torch.bfloat16, torch.float16}


class NoExperts(Rejection):
    """The function's ids choose nothing: no expert loop at all, so nobody wants to hear of it."""


class Unrolls(NoExperts):
    """Dynamo can unroll the function: there is no need to read it."""


def lies_flat(w: Tensor) -> bool:
    """Whether a tensor may hold the packed words of several experts' matrices, each in one row."""
    return w.ndim == 2 and w.dtype is torch.uint8


class Bench:
    """A call's function on a probe module: made for one element type and device, run on arguments of any token count."""

    biases = 1.0  # size of lists of parameters beside that of matrices

    def __init__(
        self,
        call: Call,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        listening: bool = False,
        seed: int = 0,
        fewer: Fewer | None = None,
    ) -> None:
        self.call, self.dtype = call, dtype
        self.widened = False  # whether casts to the tokens' own type go to `dtype` too
        self.device = device or torch.device("cpu")
        self.generator = torch.Generator().manual_seed(20 + seed)
        self.probe = Probe(call.module, self.device, seed, dtype, listening=listening, biases=self.biases, fewer=fewer)
        self.fn = self.probe.function(call.fn)

    def again(self, **kw: Any) -> Self:
        """The same bench for another element type or device."""
        return type(self)(self.call, **kw)  # type: ignore[call-arg]

    def share(self, reads: set[Place]) -> None:
        """Note reads in a set that benches share."""
        reads |= self.probe.reads
        self.probe.reads = reads

    def run(
        self, arguments: Mapping[str, Any], autocast: torch.dtype | None = None, listener: AbstractContextManager[Any] | None = None
    ) -> Any:
        """The user's function on these arguments; what it raises comes through. Raises `Rejection` for side effects.

        Where it raises because it casts to the type of its tokens by name, that name is taken for `dtype` from then on.
        """
        try:
            return self._run(arguments, autocast, listener)
        except RuntimeError:
            if not self.widen():
                raise
            try:
                return self._run(arguments, autocast, listener)
            except BaseException:
                self.widened = False
                raise

    def _run(self, arguments: Mapping[str, Any], autocast: torch.dtype | None, listener: AbstractContextManager[Any] | None) -> Any:
        cast = torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None)
        with neutral(self.call.grad, noting=False), cast, self.types(), listener or contextlib.nullcontext():
            return self.call_user(arguments)

    def _narrow(self) -> torch.dtype | None:
        """The tokens' own type, where the bench has a wider one; where they are wide, that of the parameters that are not."""
        given = {s.dtype for s in self.call.tensors.values()} & _HALF
        module = self.call.module  # no `state_dict`: hooks of the user's or of FSDP2 may hang on it
        own = given or ({t.dtype for t in (*module.parameters(), *module.buffers())} if module is not None else set()) & _HALF
        return own.pop() if self.dtype is not None and len(own) == 1 and self.dtype not in own else None

    def widen(self) -> bool:
        """From now on the types of half precision that code names stand for `dtype`; whether that is anything new."""
        new = not self.widened and self._narrow() is not None
        self.widened = self.widened or new
        return new

    def types(self) -> AbstractContextManager[Any]:
        """What code of the call is to run under, beside `neutral`."""
        narrow = self._narrow()
        if not self.widened or narrow is None or self.dtype is None:
            return contextlib.nullcontext()
        return Widened(narrow, self.dtype)

    def follow(self, some: Mapping[str, Any], others: Mapping[str, Any], tokens: Sequence[tuple[int, int]]) -> None:
        """Raise `Rejection` if what the function does may hang on how many rows there are: on `some` arguments and on `others` of as many
        tokens as `tokens` says, pair by pair."""
        first = Listener()
        try:
            self.run(others, listener=first)
            second = Listener(first.said, tuple(tokens))
            self.run(some, listener=second)
        except Rejection:
            raise
        except Exception as e:
            raise Rejection(f"it does with a number of rows what cannot be followed: {type(e).__name__}: {e}"[:300], stage="rows") from e
        if len(second.said) != len(first.said):
            raise Rejection(UNEVEN, stage="draw")

    def call_user(self, arguments: Mapping[str, Any]) -> Any:
        """The sealed function on tensors by name, with all other arguments as they were at the call."""
        args, kwargs = self.call.filled(arguments.__getitem__, self.probe.seal, self.probe.module)
        handed_in = [c for v in (*args, *kwargs.values()) for c in containers(v, Place("an argument"))]
        out = self.fn(*args, **kwargs)
        self.probe.check(handed_in)
        return out

    def weights(self) -> Iterator[Tensor]:
        """Every tensor that may hold parameters."""
        yield from self.probe.tensors.values()

    def sizes(self) -> set[int]:
        """Every size and number around, but for the token counts."""
        found = {d for w in self.weights() for d in w.shape}
        found |= {d for s in self.call.tensors.values() for d in s.shape[-1:] if isinstance(d, int)}
        return found | {v for m in (self.call.module.modules() if self.call.module else ()) for v in vars(m).values() if type(v) is int}

    def lists(self) -> list[Any]:
        """Every container of modules or parameters."""
        return [m for m in (self.call.module.modules() if self.call.module else ()) if isinstance(m, CONTAINERS)]

    def narrow(self) -> tuple[tuple[int, int], ...]:
        """Narrow sizes for its wide ones; none where all weights are packed matrices that lie flattened, whose sizes are products."""
        lists = {len(m) for m in self.lists()}
        rows = {d for s in self.call.tensors.values() for d in s.shape[-1:] if isinstance(d, int) and s.dtype.is_floating_point}
        found = list(self.weights())
        if not lists and all(w.ndim < 3 for w in found) and any(lies_flat(w) for w in found):
            return ()
        return narrow([w.shape for w in found], rows, lists)

    def shape(self, name: str) -> tuple[Any, ...]:
        """The shape of a tensor that is handed in, on this bench."""
        shape, fewer = self.call.tensors[name].shape, self.probe.fewer
        return shape if fewer is None else fewer.shape(shape)

    def rows(self, lead: Sequence[int], spec: Spec) -> Tensor:
        """Tokens [*lead, H] of several magnitudes."""
        fewer = self.probe.fewer
        width = spec.shape[-1] if fewer is None else fewer.number(spec.shape[-1])
        x = torch.randn(*lead, width, generator=self.generator)
        x = x * torch.tensor([0.25, 1.0, 4.0, 32.0])[torch.arange(x[..., 0].numel()) % 4].view(*lead, 1)
        return x.to(self.device, wider(spec.dtype, self.dtype))

    def complete(self, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors in the call's order."""
        return {n: made[n] for n in self.call.tensors}


class BlockBench(Bench):
    """For functions of tokens alone, with the router inside."""

    biases = 0.125  # a bias of the choice must not shut experts out

    def arguments(self, lead: Sequence[int], alike: bool = False) -> dict[str, Tensor]:
        """Arguments for tokens [*lead, H]; `alike`: all tokens nearly the same, so that few experts are chosen."""
        ((name, spec),) = self.call.tensors.items()
        x = self.rows(lead, spec)
        if alike:
            x = x.flatten()[: x.shape[-1]] + x * 1e-3
        return self.complete({name: x})


class DispatchBench(Bench):
    """For functions of tokens, ids and routing weights."""

    def __init__(self, call: Call, roles: Roles, dtype: torch.dtype | None = None, **kw: Any) -> None:
        super().__init__(call, dtype, **kw)
        self.roles = roles
        windows = Windows(self.device, self.generator, 0.2)
        self.given = {n: windows.take(self.shape(n), wider(call.tensors[n].dtype, dtype)) for n in roles.params}

    def again(self, **kw: Any) -> Self:
        return type(self)(self.call, self.roles, **kw)

    def weights(self) -> Iterator[Tensor]:
        yield from self.given.values()
        yield from super().weights()

    def arguments(self, ids: Tensor, lead: Sequence[int] | None = None, masked: bool = False) -> dict[str, Tensor]:
        """Arguments for a routing ids [T, k] of tokens [*lead, H]: routing weights of both signs; `masked`: masks are not all true."""
        r, t = self.roles, self.call.tensors
        if lead is None:
            lead = [1] * (len(t[r.tokens].shape) - 2) + [ids.shape[0]]
        w = torch.rand(ids.shape, generator=self.generator) * 1.5 - 0.25
        made = {
            r.tokens: self.rows(lead, t[r.tokens]),
            r.ids: (ids.reshape(-1) if len(t[r.ids].shape) == 1 else ids).to(self.device, t[r.ids].dtype),
            **self.given,
            **{n: self._extra(n, ids.shape[0], masked) for n in r.extras},
        }
        w = w.view(*made[r.ids].shape, *[1] * (len(t[r.weights].shape) - made[r.ids].ndim))
        made[r.weights] = w.to(self.device, wider(t[r.weights].dtype, self.dtype))
        return self.complete(made)

    def _extra(self, name: str, tokens: int, masked: bool) -> Tensor:
        spec, shape = self.call.tensors[name], (tokens, *self.shape(name)[1:])
        if spec.dtype is torch.bool:
            true = torch.ones(shape, dtype=torch.bool)
            return (true if not masked else torch.rand(shape, generator=self.generator) < 0.7).to(self.device)
        made = torch.randn(shape, generator=self.generator)
        return made.to(self.device, wider(spec.dtype, self.dtype) if spec.dtype.is_floating_point else spec.dtype)

    def uneven(self, tokens: int, experts: int) -> Tensor:
        """ids [tokens, k]: each expert is hit twice, and some much more often than others."""
        even = self.routing(-(-2 * experts // self.roles.k), range(experts))
        odds = (torch.rand(experts, generator=self.generator) ** 2 + 0.02).expand(tokens - len(even), experts)
        return torch.cat([even, odds.multinomial(self.roles.k, generator=self.generator)])

    def routing(self, tokens: int, experts: Sequence[int] | range) -> Tensor:
        """ids [tokens, k], distinct in each row, that hit each of `experts` if tokens * k >= len(experts)."""
        k, pool = self.roles.k, torch.tensor(list(experts))
        order = torch.cat([pool[torch.randperm(len(pool), generator=self.generator)] for _ in range(-(-tokens * k // len(pool)))])
        ids = order[: tokens * k].view(tokens, k)
        for t, row in enumerate(ids.tolist()):  # where two shuffles meet, a row may hold an expert twice
            if twice := [i for i in range(k) if row[i] in row[:i]]:
                others = pool[~torch.isin(pool, ids[t])]
                ids[t, twice] = others[torch.randperm(len(others), generator=self.generator)[: len(twice)]]
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
            if out is None:  # a check of its arguments
                raise NoExperts("it returns nothing", stage="read")
            if not isinstance(out, Tensor):
                raise Rejection("it returns something else than one tensor", stage="read")
            outs.append(out)
        if len(outs) == 2 and not torch.equal(*outs):
            return n
    raise NoExperts("no argument or parameter tells how many experts there are", stage="read")
