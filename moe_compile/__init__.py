"""Recover, prove and fuse the Mixture-of-Experts blocks of a model: ``torch.compile(model, backend="moe_fused")``."""

from __future__ import annotations

from pathlib import Path

# passes/ and lowering/ stand beside this folder in a checkout and inside it once installed. Where Python finds the checkout first (it runs
# in the repository's root), they are looked up beside it.
_CHECKOUT = Path(__file__).parent.parent
if (_CHECKOUT / "passes" / "pipeline.py").is_file() and (_CHECKOUT / "lowering" / "target.py").is_file():
    __path__.append(str(_CHECKOUT))

from . import entry, ir  # noqa: E402
from ._version import __version__  # noqa: E402
from .ahead import prepare  # noqa: E402
from .errors import NotFused, OptionError  # noqa: E402
from .explain import explain  # noqa: E402
from .findings import BlockReport, GraphBreak  # noqa: E402
from .options import Options  # noqa: E402
from .parallel import parallelize  # noqa: E402
from .passes.aten.contracts import register_contract  # noqa: E402
from .report import last_report  # noqa: E402
from .reported import Report  # noqa: E402
from .trace import Traced, trace  # noqa: E402

__all__ = [
    "BlockReport", "GraphBreak", "NotFused", "OptionError", "Options", "Report", "Traced", "__version__", "explain", "ir", "last_report",
    "parallelize", "prepare", "register_contract", "trace",
]  # fmt: skip

entry.register()
