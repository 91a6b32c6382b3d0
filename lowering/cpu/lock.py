"""A lock of a file among the processes of a machine. Where there is none (a network's file system, Windows), everybody goes on alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

POLL_S = 0.05
PATIENCE_S = 600.0  # of one whose holder hangs; what is built twice is right all the same

_held: set[int] = set()


@contextmanager
def locked(file: Path, enough: Callable[[], bool]) -> Iterator[None]:
    """Hold `file`, made and taken away again, or go on without: after `PATIENCE_S` seconds, when `enough()`, or where there are no locks.

    The kernel gives a lock back when its process ends, however that comes about.
    """
    handle = _taken(file, enough)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):  # whoever waits for it has it open, and sees below that it is gone; what stays is taken by the next one
                file.unlink()
            _held.discard(handle)
            os.close(handle)


def _taken(file: Path, enough: Callable[[], bool]) -> int | None:
    end = time.monotonic() + PATIENCE_S
    while not enough() and time.monotonic() < end:
        try:
            import fcntl

            handle = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except (ImportError, OSError):
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(file, handle):
                _held.add(handle)
                return handle
        except BlockingIOError:
            time.sleep(POLL_S)
        except OSError:
            os.close(handle)
            return None
        os.close(handle)
    return None


def _is(file: Path, handle: int) -> bool:
    """Whether the name still stands for what was opened: its last holder may have taken it away meanwhile."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _forked() -> None:
    """A forked process would hold its parent's locks for as long as it lives."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
