"""Makes `torch.ops.npu.*` exist on any machine: torch_npu's own where it can be imported, else ours; CPU kernels in both cases."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from . import emulate, metas, schemas

_libraries: list[torch.library.Library] = []


@functools.cache
def ensure() -> bool:
    """Make the ops exist, with CPU kernels. Returns whether they are torch_npu's own definitions."""
    own = not schemas.wheel()
    if own:
        _define("npu", schemas.NPU)
        for space in ("air", "npugraph_ex"):
            _define(space, schemas.STREAM)
            _streams(space)
    lib = torch.library.Library("npu", "IMPL")
    for name, kernel in emulate.KERNELS.items():
        if hasattr(torch.ops.npu, name):  # an older wheel lacks the newest
            lib.impl(name, kernel, "CPU")
    _libraries.append(lib)
    if own:
        metas.register()
    return not own


def custom() -> None:
    """Define the ops of other packages, with CPU kernels and shapes: for machines that have none of them."""
    lib = torch.library.Library("custom", "FRAGMENT")
    for name, schema in schemas.CUSTOM.items():
        if not hasattr(torch.ops.custom, name):
            lib.define(schema)
            lib.impl(name, emulate.CUSTOM_KERNELS[name], "CPU")
            torch.library.register_fake(f"custom::{name}", metas.METAS[name], lib=lib)
    _libraries.append(lib)


def _define(space: str, wanted: Sequence[str]) -> None:
    lib = torch.library.Library(space, "FRAGMENT")
    for schema in wanted:
        lib.define(schema)
    _libraries.append(lib)


def _streams(space: str) -> None:
    """Stream scopes and events mean nothing on one stream; graphs keep them because they have effects."""
    lib = torch.library.Library(space, "IMPL")
    for name in ("scope_enter", "scope_exit", "tagged_event_record", "tagged_event_wait"):
        lib.impl(name, lambda *args, **kwargs: None, "CompositeExplicitAutograd")
        torch.fx.node.has_side_effect(getattr(getattr(torch.ops, space), name).default)
    lib.impl("wait_tensor", lambda self, dependency: self.clone(), "CompositeExplicitAutograd")
    _libraries.append(lib)
