"""An artifact of each compilation in torch's structured trace: TORCH_TRACE=folder, then `tlparse folder` lists it beside the graphs."""

from __future__ import annotations

import json
import logging

from .reported import Report

log = logging.getLogger("moe_compile")


def leave(report: Report) -> None:
    """Write a report where TORCH_TRACE asks for it. Does nothing without it, and never fails."""
    try:
        from torch._logging import trace_structured

        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "moe_compile_report", "encoding": "json"},
            payload_fn=lambda: json.dumps(report.to_dict(), indent=2, ensure_ascii=False),
        )
    except Exception as e:  # a report about a compilation is no reason for it to fail
        log.debug("no artifact was left: %s: %s", type(e).__name__, e)
