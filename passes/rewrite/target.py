"""What the passes ask of the machine that the fused ops will run on (`moe_compile.lowering.target.Target` answers it)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ...ir import MoeBlock


class Target(Protocol):
    """router_tokens: for up to how many tokens the routing op takes the router's product in. shares: whether the experts' op takes the
    shared expert in, shares_coded: the op of experts in few bits. alone_tokens: for up to how many tokens a
    shared expert in few bits is an op of its own, 0 for any number. casts: whether `experts` makes
    weights as wide as the tokens by itself, matrix by matrix. places: whether it has an op for `ir.placement.physical`. digest: of
    its sources, machine: the family of devices; what can be lowered is part of a plan on disk.
    """

    @property
    def name(self) -> str: ...
    @property
    def router_tokens(self) -> int: ...
    @property
    def shares(self) -> bool: ...
    @property
    def shares_coded(self) -> bool: ...
    @property
    def places(self) -> bool: ...
    @property
    def alone_tokens(self) -> int: ...
    @property
    def casts(self) -> bool: ...
    @property
    def digest(self) -> str: ...
    @property
    def machine(self) -> Callable[[], str]: ...
    @property
    def decodes(self) -> Callable[[MoeBlock], str]:
        """Why a shared expert in few bits is no op of its own there, "" where it may be."""

    def reason(self, ir: MoeBlock) -> str | None:
        """Why a block cannot run there, None where it can."""

    @property
    def says(self) -> Callable[[MoeBlock], str]:
        """What runs a block there."""

    def begin(self, ir: MoeBlock) -> None:
        """Start getting ready for a block."""
