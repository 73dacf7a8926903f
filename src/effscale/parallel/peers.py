"""Failure handling between the processes of one run: agree on a failure, and end when a process is lost."""

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

T = TypeVar("T")

LOST_PEER = 75
"""Exit status of a process that ended because another one was lost: EX_TEMPFAIL, try again."""

_ENDED = (
    "effscale/ended"  # in the coordinator's key-value store: which process ended first, and how
)
_PLACES = "effscale/places/"  # in the same store: pid and host of each process
_COLLECTED = "effscale/collected/"
_BROKEN = (
    "Gloo ",
    "Connection closed by peer",
    "Connection reset by peer",
    "coordination service",
    "CoordinationService",
    "heartbeat",
    "Socket closed",
    "Barrier timed out",
)


def on_first(function: Callable[[], T]) -> T | None:
    """Call a function on process 0; an exception that it raises there is raised on every process.

    Args:
        function: What to do, such as writing a file that all processes share.

    Returns:
        The function's value on process 0, None on the others.

    Raises:
        RuntimeError: On the other processes, if the function failed; with the error message of process 0.
    """
    if jax.process_count() == 1:
        return function()
    from jax.experimental import multihost_utils

    value, failure = None, None
    if jax.process_index() == 0:
        try:
            value = function()
        except Exception as error:
            failure = error
    text = "" if failure is None else f"{failure}" or type(failure).__name__
    message = np.frombuffer(text.encode()[:4096].ljust(4096, b"\0"), np.uint8)
    message = bytes(np.asarray(multihost_utils.broadcast_one_to_all(message))).rstrip(b"\0")
    if failure is not None:
        raise failure
    if message:
        raise RuntimeError(message.decode(errors="replace"))
    return value


def collect_on_first(name: str, text: str, *, seconds: float | int = 600) -> list[str | None]:
    """Send a text from each process to process 0 through the coordinator; it uses no collective, so background threads can call it.

    Args:
        name: The same on all processes, and different for each call.
        text: The text of this process, a few hundred kilobytes at most.
        seconds: How long process 0 waits for all of the others together.

    Returns:
        On process 0 the texts by process, None for those that sent nothing in time; on the others an empty list.
    """
    state = _state()
    if state.client is None or state.num_processes == 1:
        return [text]
    if state.process_id:
        state.client.key_value_set(f"{_COLLECTED}{name}/{state.process_id}", text)
        return []
    until = time.monotonic() + seconds
    found: list[str | None] = [text]
    for process in range(1, state.num_processes):
        left = max(1, int(1000 * (until - time.monotonic())))
        try:
            found.append(state.client.blocking_key_value_get(f"{_COLLECTED}{name}/{process}", left))
        except Exception:  # JAX's runtime has no exception type for a timeout
            found.append(None)
    state.client.key_value_delete(f"{_COLLECTED}{name}/")
    return found


@contextlib.contextmanager
def ending_together(advice: str = "start all processes again") -> Iterator[None]:
    """Within this context, the failure of one process ends all of them immediately, with a message that explains why.

    Otherwise, a failed process waits for the others in JAX's shutdown, and they wait for it in a collective.

    A process that loses another one prints which one was lost, as far as that is known, and exits with status 75
    (``LOST_PEER``). A process that fails itself prints its traceback, notifies the others, and exits with status 1, or with
    that of its ``SystemExit``. A process with exit status 0, or above 128 (stopped by a signal), ends normally, as the others
    do. In a run with a single process, nothing changes.

    JAX notices a process that hangs, or whose machine is cut off, after ``DistributedConfig.heartbeat_timeout``. JAX then ends
    the others itself, with its own message that lists the lost processes ("tasks").

    Args:
        advice: What to do when a process is lost, used as the end of the message.

    Example:
        >>> with ending_together("start all processes again; the run resumes from its last checkpoint"):
        ...     pass  # train
    """
    _watch.advice = advice
    try:
        yield
    except SystemExit as stop:
        if _several() and stop.code and not (isinstance(stop.code, int) and stop.code > 128):
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            _fail(stop.code if isinstance(stop.code, int) else 1)
        raise
    except BaseException as error:
        if _several():
            if is_broken_connection(error):
                _watch.stop()
                _end(_loss())
            traceback.print_exc()
            _fail(1)
        raise
    finally:
        _watch.advice = None


def is_broken_connection(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, is a failure to reach the other processes of this run.

    >>> is_broken_connection(ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"))
    True
    """
    while error is not None:
        if any(words in str(error) for words in _BROKEN):
            return True
        error = error.__cause__ or error.__context__
    return False


def watch_peers() -> None:
    """Register this process with the coordinator and watch for failures of the others; ``initialize`` calls it."""
    state = _state()
    if state.client is None or state.num_processes == 1:
        return
    place = f"pid {os.getpid()} on {socket.gethostname()}"
    state.client.key_value_set(f"{_PLACES}{state.process_id}", place)
    _watch.start()


class _Watch:
    """A thread that periodically asks the coordinator whether a process has failed.

    A collective that waits for another process does not notice its failure. When the coordinator ends, JAX ends all other
    processes with a C++ stack trace.

    Attributes:
        advice: What to do then; None outside of ``ending_together``, where the thread takes no action.
    """

    def __init__(self):
        self.advice: str | None = None
        self._stopped = threading.Event()

    @property
    def seconds(self) -> float:
        """Return the time between two requests; the coordinator gets at most 200 per second."""
        return max(1.0, _state().num_processes / 200)

    def start(self) -> None:
        threading.Thread(target=self._run, name="effscale-peers", daemon=True).start()
        atexit.register(self.stop)  # registered last, so it runs before JAX's own shutdown

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self.seconds):
            text = _published()
            if text and self.advice is not None and not self._stopped.is_set():
                _end(text)


_watch = _Watch()


def _loss() -> str:
    """Return a message about which process was lost, and notify the others."""
    state = _state()
    several, me = state.num_processes, state.process_id
    coordinator = f"process 0 of {several}, the coordinator, was lost; see its output"
    if several == 2 and me == 1:
        return coordinator  # without asking it, because JAX is about to end this process
    try:
        places = state.client.key_value_dir_get(_PLACES)
    except Exception:
        return coordinator
    known = {int(key.rpartition("/")[2]): place for key, place in places}
    gone = [i for i in range(several) if several == 2 and i != me] or [
        i for i, place in known.items() if _is_dead(place)
    ]
    named = " and ".join(
        f"process {i} of {several} ({known.get(i, 'place unknown')})" for i in gone
    )
    return _publish(
        f"{named or f'one of the {several - 1} other processes'} was lost; see its output"
    )


def _is_dead(place: str) -> bool:
    """Return whether the process of a place was on this host and has ended."""
    _, pid, _, host = place.split(" ", 3)
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _published() -> str | None:
    """Return the message of the first process to fail, if one has failed and the coordinator is reachable."""
    try:
        return _state().client.key_value_try_get(_ENDED)
    except Exception:
        return None


def _publish(text: str) -> str:
    """Publish what has happened unless another process was first; return the message of the first one."""
    with contextlib.suppress(Exception):
        _state().client.key_value_set(_ENDED, text)
    return _published() or text


def _fail(status: int) -> NoReturn:
    """End this process, whose own error has been shown, and notify the others."""
    _watch.stop()
    state = _state()
    _publish(f"process {state.process_id} of {state.num_processes} failed; see its output")
    _leave(status)


def _end(text: str) -> NoReturn:
    """End this process because of another one."""
    print(f"error: {text}; {_watch.advice}", file=sys.stderr)
    _leave(LOST_PEER)


def _leave(status: int) -> NoReturn:
    """End this process without the barrier at which JAX's shutdown would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _state().process_id == 0:
        time.sleep(
            2 * _watch.seconds
        )  # the messages are lost when the coordinator ends, so give the others time to ask
    os._exit(status)


def _several() -> bool:
    # Not jax.process_count(), which would start the backend and wait for the other processes.
    return jax.distributed.is_initialized() and _state().num_processes > 1


def _state() -> Any:
    from jax._src import distributed

    return distributed.global_state
