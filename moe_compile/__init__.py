"""Recover, prove and fuse the Mixture-of-Experts blocks of a model: ``torch.compile(model, backend="moe_fused")``."""

from __future__ import annotations

from . import ir
from ._version import __version__
from .ahead import prepare
from .errors import NotFused, OptionError
from .explain import explain
from .options import Options
from .report import BlockReport, GraphBreak, Report, last_report

__all__ = [
    "BlockReport",
    "GraphBreak",
    "NotFused",
    "OptionError",
    "Options",
    "Report",
    "__version__",
    "explain",
    "ir",
    "last_report",
    "prepare",
]
