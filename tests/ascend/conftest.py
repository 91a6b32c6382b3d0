"""Shared by the Ascend tests."""

from __future__ import annotations

import pytest

from moe_compile.lowering.ascend import modes
from moe_compile.lowering.ascend.weights import Store


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of packed weights for this test alone: what other tests leave is collected at any time, and the shared count falls."""
    own = Store()
    monkeypatch.setattr(modes, "STORE", own)
    return own
