"""How each pass read a model: for whoever brings up a model that declines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .explain import explain
from .reported import Report
from .trace_html import page
from .trace_text import text

if TYPE_CHECKING:
    from .passes.trace import Trace


@dataclass
class Traced:
    """A report and the passes behind it; `str()` is text, `to_html()` one self-contained page."""

    report: Report
    trace: Trace

    def text(self, stage: str = "") -> str:
        """All passes, with the first lines of long graphs and terms; or one pass (`stage`) in full. The report comes last.

        Raises ValueError where no pass has that name.
        """
        return f"{text(self.trace, stage)}\n\n{self.report}"

    def __str__(self) -> str:
        return self.text()

    def to_html(self) -> str:
        """The whole trace and the report as one HTML document that loads nothing else."""
        return page(self.report, self.trace)


def trace(model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Traced:
    """As `explain`, with what each pass was given and made of it, which rules fired how often, and the first predicate that failed.

    Plans that are kept on disk are not replayed: every pass runs. A loop that this process read before is not read again.
    Raises what `explain` raises.
    """
    from .passes import trace as passes

    with passes.collecting() as found:
        report = explain(model, *args, options=options, **kwargs)
    return Traced(report, found)
