"""Stopping a run by SIGTERM (a scheduler's warning) or Ctrl-C."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np

logger = logging.getLogger(__name__)


class StopSignal:
    """A context in which SIGTERM and SIGINT ask the run to save and stop; a second SIGINT interrupts immediately.

    No signal is lost: one that arrives too late for ``should_stop`` is raised again when the context ends, for the previous
    handler. Handlers can only be set in the main thread; in other threads the signals keep their meaning.

    Args:
        sync_every: With several processes, the number of steps after which they synchronize, so that all stop at the same step.

    Attributes:
        received: The signal, if one has arrived. Once ``should_stop`` has returned True, it is the same on every process.
    """

    def __init__(self, *, sync_every: int = 16):
        if sync_every < 1:
            raise ValueError(f"sync_every must be at least 1, got {sync_every}")
        self.sync_every = sync_every
        self.received: int | None = None
        self._heeded = False
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
        if exception[0] is None and self.received is not None and not self._heeded:
            signal.raise_signal(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def should_stop(self, step: int, *, last: bool = False) -> bool:
        """Return whether to stop after ``step``; the same answer on every process.

        Args:
            step: The step.
            last: Whether this is the last step, so that the processes synchronize regardless of ``sync_every``.
        """
        if jax.process_count() > 1:
            if step % self.sync_every and not last:
                return False
            from jax.experimental import multihost_utils

            numbers = multihost_utils.process_allgather(np.array(self.received or 0, np.int32))
            self.received = int(numbers.max()) or None
        self._heeded = self.received is not None
        return self._heeded
