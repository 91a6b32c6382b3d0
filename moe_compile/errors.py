"""The exceptions a user may catch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

# Dynamo wraps whatever a backend raises in BackendCompilerFailed, all but this family, so that
# `except moe_compile.NotFused` and `except ValueError` work as written.
from torch._dynamo.exc import ShortenTraceback

from .ir import Rejection


class NotFused(ShortenTraceback):
    """Raised with `strict=True` when a Mixture-of-Experts block was left as written.

    `.rejected` holds the `Rejection`s the message is made of, so that a program can read the reasons too.
    """

    def __init__(self, rejected: Sequence[Rejection]) -> None:
        lines = [f"{r.source or 'unknown source'}: {r.reason} [{r.code or r.stage}]" for r in rejected]
        super().__init__("\n  ".join(["not fused (strict=True):", *lines]), first_useful_frame=None)
        self.rejected = list(rejected)


class OptionError(ShortenTraceback, ValueError):
    """An option that does not exist or a value it does not take; the message names the option and what is allowed."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises OptionError where an option has none of the allowed values."""
    # `is`-like comparison: 1 == True, but `validate=1` is more likely a mistake than a wish
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise OptionError(f"option {name!r} is {value!r}; allowed: {', '.join(repr(a) for a in allowed)}")
