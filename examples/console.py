"""What the examples show while they work: a spinner or bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

err = Console(stderr=True, highlight=False)


@contextmanager
def stage(label: str) -> Iterator[None]:
    """Show `label` while the body runs, then how long it took if that was more than a second."""
    start = time.perf_counter()
    if not err.is_terminal:
        err.print(f"{label} ...")
    with err.status(label) if err.is_terminal else nullcontext():
        yield
    seconds = time.perf_counter() - start
    if seconds > 1:
        err.print(f"[dim]{label}: {seconds:.1f} s[/dim]")


class TrainingBar:
    """Progress of a training run: a live bar on a terminal, twenty lines elsewhere."""

    def __init__(self, label: str, steps: int) -> None:
        self.label, self.steps = label, steps
        self.every = max(1, steps // 20)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=err,
            disable=not err.is_terminal,
        )
        self.task = self.bar.add_task(f"{label}: first step, compiling", total=steps, loss="-")

    def __enter__(self) -> TrainingBar:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def update(self, step: int, loss: float, seconds: float) -> None:
        """step counts from 0; seconds since the start of the run."""
        self.bar.update(self.task, completed=step + 1, loss=f"{loss:.4f}", description=self.label)
        if not err.is_terminal and (step % self.every == 0 or step + 1 == self.steps):
            err.print(f"{self.label}: step {step + 1}/{self.steps}  loss {loss:.4f}  {seconds:.0f} s")
