"""The record of a target: what a folder in `lowering/`, or a package of somebody else's, says of the machine that it is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch.fx as fx
from torch import nn

from ..ir import MoeBlock
from ..ir.text import stored_text
from ..ops import sources


@dataclass(frozen=True)
class NoOptions:
    """The options of a target that has none of its own."""


class Chosen(Protocol):
    """The user's options as a target sees them (`moe_compile.Options`)."""

    @property
    def inner(self) -> str | Callable[..., Any]: ...
    @property
    def inner_options(self) -> Mapping[str, Any]: ...
    @property
    def strict(self) -> bool: ...
    @property
    def overlap_shared(self) -> bool | str: ...
    def of(self, target: str) -> Any:
        """The target's own, an instance of its `Target.options`."""


@dataclass(frozen=True)
class Rest:
    """What a target that compiles graphs itself (`Target.finish`) is given besides the graph.

    mode: torch.compile's. compile_with: hands (a graph, example inputs, a mode) to the compiler that the user named, which options.inner
    other than "auto" says. tell: adds remarks to the report. explaining: whether a report is what the compilation is for.
    """

    options: Chosen
    mode: str | None
    compile_with: Callable[[fx.GraphModule, Sequence[Any], str | None], Callable[..., Any]]
    tell: Callable[[Sequence[str]], None]
    explaining: bool = False


@dataclass(frozen=True)
class Target:
    """One target. Meaning is decided before it is asked: it reads the IR and the ops' arguments, never the graph.

    name: what `options={"target": name}` says. devices: the types of the devices whose tensors it takes ("cuda"), for target "auto".
    refuses: None where it can run a block, else the reason, one sentence. says: what runs a block, for the report.
    kernels: op name (`moe_compile.ops`) -> implementation, registered on `dispatch_key`; ops without one run in plain torch.
    straight: calls an op on CUDA below autograd without the dispatcher.
    options: a frozen dataclass of the target's own options, all with defaults; its `__post_init__` raises `OptionError` on a wrong value.
    finish: compiles a graph with fused ops in it, in place of the inner compiler. prepare: begins to get ready for a block and returns.
    check_inner: raises `OptionError` for `inner_options` that nothing behind `finish` knows.
    lacks: where a block's kernels cannot be had, (what runs it in place of what `says` tells, why); waits so many seconds at most.
    remarks: what else the report says of a graph with fused ops, given its inputs.
    rearrange: `moe_compile.prepare` for this target: (model, training, weight_format) -> {name: bytes}.
    coded, chained: whether weights in few bits (`ir.Stored`), and experts that are a chain (`ir.Chain`), are known to `refuses` at all.
    decodes: why a shared expert in few bits, given as a block of one expert, is better left to the rest of the graph, "" where the target's
    kernels read its codes.
    alone_tokens: for up to how many tokens such a shared expert is an op of its own, 0 for any number.
    places: whether its `finish` takes the calls that make physical experts of logical ones (`ir.placement.physical`).
    casts: whether `experts` makes weights as wide as the tokens by itself, those of experts that are hit alone.
    router_tokens: for up to how many tokens the routing op takes the router's product in. missing: what keeps it from running on this
    machine, "" for nothing.
    machine: the family of devices that `refuses` and `says` depend on beside the IR, "" for none: plans on disk are kept for each.
    homes: folders of its sources, set where a target is found.
    """

    name: str
    devices: tuple[str, ...]
    refuses: Callable[[MoeBlock], str | None]
    says: Callable[[MoeBlock], str]
    dispatch_key: str = ""
    kernels: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    straight: Callable[..., Any] | None = None
    options: type = NoOptions
    finish: Callable[[Rest, fx.GraphModule, Sequence[Any]], Callable[..., Any]] | None = None
    check_inner: Callable[[Mapping[str, Any]], None] | None = None
    prepare: Callable[[MoeBlock], None] | None = None
    rearrange: Callable[[nn.Module, bool, str], dict[str, int]] | None = None
    lacks: Callable[[MoeBlock, float | None], tuple[str, str] | None] | None = None
    remarks: Callable[[fx.GraphModule, Sequence[Any]], Sequence[str]] | None = None
    coded: bool = False
    chained: bool = False
    decodes: Callable[[MoeBlock], str] = lambda ir: "the target has no kernel for one expert in few bits that all tokens use"
    alone_tokens: int = 0
    places: bool = False
    casts: bool = False
    router_tokens: int = 0
    missing: Callable[[], str] = lambda: ""
    machine: Callable[[], str] = lambda: ""
    homes: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Of its sources: plans and compiled graphs on disk are kept for them."""
        return sources.digest(*self.homes)

    @property
    def shares(self) -> bool:
        """Whether its ops take the shared expert in, to run it beside the routed ones."""
        return "experts_shared" in self.kernels

    @property
    def shares_coded(self) -> bool:
        """`shares`, of routed experts in few bits."""
        return "experts_stored_shared" in self.kernels

    def reason(self, ir: MoeBlock) -> str | None:
        """None where the target can run a block, else the reason, one sentence for the report."""
        if ir.experts.coded and not self.coded:
            kinds = dict.fromkeys(stored_text(s) for s in (ir.experts.up_stored, ir.experts.down_stored) if s is not None)
            return f"{' and '.join(kinds)} expert weights: target {self.name!r} has no kernel for them"
        if ir.experts.chain is not None and not self.chained:
            return f"norms, residuals or more than two products in an expert: target {self.name!r} has no kernel for them"
        return self.refuses(ir)

    def begin(self, ir: MoeBlock) -> None:
        """Let the target start getting ready for a block (build its kernels) while the rest of the graph still compiles; never waits."""
        if self.prepare is not None:
            self.prepare(ir)


def absent(name: str) -> Target:
    """What stands for a device that no target takes: nothing is fused for it, and the report says so."""
    return Target(name, (), lambda ir: f"no lowering for target {name!r} is installed", lambda ir: "none")
