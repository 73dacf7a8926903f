"""Progress on the console: a bar on a terminal, periodic lines elsewhere."""

import sys
import time
from typing import Any

import numpy as np

from effscale.training.metrics import Values


class ConsoleWriter:
    """A progress bar with loss, tokens/s and time left; plain lines if the output is not a terminal.

    Args:
        num_steps: The number of steps of the whole run.
        start_step: The step from which a resumed run continues.
        every_seconds: The minimum time between plain lines.
        console: A ``rich.console.Console``; None writes to standard error.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        start_step: int = 0,
        every_seconds: float = 10.0,
        console: Any = None,
    ):
        from rich.console import Console

        self.num_steps, self.every_seconds = num_steps, every_seconds
        self.console = console or Console(file=sys.stderr)
        self._start_step, self._start_time = start_step, time.monotonic()
        self._last_line, self._shown = float("-inf"), {}
        self._bar: Any = None
        if self.console.is_terminal:
            self._open_bar()

    def _open_bar(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(
            "train", total=self.num_steps, completed=self._start_step, text=""
        )
        self._bar.start()

    def write(self, step: int, values: Values, timing: Values | None = None) -> None:
        """Show the step, its loss (and the last evaluation's) and the speed."""
        self._shown |= {
            name: value for name, value in values.items() if _is_shown(name) and np.ndim(value) == 0
        } | dict(timing or {})
        text = _text(self._shown)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        # Losses that a step reports, such as an auxiliary loss, are not evaluation results.
        of_step = "loss" in values or "skipped_in_row" in values
        evaluated = not of_step and any(map(_is_shown, values))
        if evaluated or step >= self.num_steps or now - self._last_line >= self.every_seconds:
            self._last_line = now
            left = self._seconds_left(step, now)
            self.console.print(
                f"step {step}/{self.num_steps}  {text}  {left}", highlight=False, soft_wrap=True
            )

    def _seconds_left(self, step: int, now: float) -> str:
        done = step - self._start_step
        if done <= 0:
            return ""
        left = int((now - self._start_time) / done * max(self.num_steps - step, 0))
        return f"left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"

    def flush(self) -> None:
        """Do nothing, as output is not buffered."""

    def close(self) -> None:
        """Stop the bar and leave it as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _is_shown(name: str) -> bool:
    """Return whether to show a metric: losses, and the goals of reinforcement learning."""
    return name.endswith("loss") or name in ("score", "kl")


def _text(shown: Values) -> str:
    parts = [f"{name} {value:.4f}" for name, value in shown.items() if _is_shown(name)]
    if "tokens_per_second" in shown:
        parts.append(f"{shown['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)
