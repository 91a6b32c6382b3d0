"""What `sampled` names is there: a test that was renamed would run in full again, and nobody would know."""

from __future__ import annotations

import re

import pytest
import sampled


@pytest.mark.parametrize("key", sampled.ONE_IN, ids="::".join)
def test_a_sampled_test_is_there(key: tuple[str, str]) -> None:
    assert re.search(rf"^def {key[1]}\(", (sampled.HERE / key[0]).read_text(encoding="utf-8"), re.M)
