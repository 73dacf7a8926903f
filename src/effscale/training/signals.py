"""Stopping a run from outside: SIGTERM (a scheduler's warning) and Ctrl-C."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np

logger = logging.getLogger(__name__)


class StopSignal:
    """Within this context SIGTERM and SIGINT ask the run to save and end; a second SIGINT interrupts at once.

    Handlers can be set in the main thread only; elsewhere the signals keep their meaning.

    Args:
        sync_every: With several processes, they compare notes each that many steps, so that all stop at one step.
    """

    def __init__(self, *, sync_every: int = 16):
        if sync_every < 1:
            raise ValueError(f"sync_every={sync_every} must be at least 1")
        self.sync_every = sync_every
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def should_stop(self, step: int) -> bool:
        """Whether to stop after ``step``; the same answer on every process."""
        if jax.process_count() == 1:
            return self.received is not None
        if step % self.sync_every:
            return False
        from jax.experimental import multihost_utils

        flags = multihost_utils.process_allgather(np.array(self.received is not None))
        return bool(flags.any())
