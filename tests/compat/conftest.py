"""Collected by `make test-compat` only: the main suite has the zoo on the transformers it pins."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the zoo

collect_ignore = [] if "COMPAT" in os.environ else ["test_transformers.py"]
