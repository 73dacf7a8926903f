"""Several JAX processes on this one machine, to try out and to test programs for many.

``python -m effscale.parallel.local_launch --processes 2 --devices 4 -- python train.py`` starts ``train.py`` twice,
each with four virtual CPU devices. The program has to call ``effscale.parallel.initialize`` first.
"""

import argparse
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from effscale.parallel.peers import LOST_PEER
from effscale.parallel.startup import HEARTBEAT_VARIABLE, VARIABLES

STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit statuses of a process that was asked to stop, and saved; the others are saving, too."""

AFTER_A_LOSS = (LOST_PEER, -signal.SIGABRT)
"""Exit statuses of a process that ended because another one was gone."""

SECONDS_TO_SAVE = 60

SECONDS_TO_END = 2
"""How long the process that the others have lost may take to end itself: they can notice its end before it is over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessResult:
    """What became of one process."""

    process_id: int
    """Its number, from 0."""
    returncode: int
    """Its exit status; negative: the signal that ended it."""
    stdout: str
    """All it wrote to standard output."""
    stderr: str
    """All it wrote to standard error."""


class LaunchError(RuntimeError):
    """A process failed, or time ran out; the message holds the end of its output.

    Attributes:
        results: What became of the processes.
        status: What a shell would call the exit status of the process that failed; 1 if time ran out.
    """

    def __init__(self, message: str, results: list[ProcessResult], status: int = 1):
        super().__init__(message)
        self.results, self.status = results, status


def launch_local(
    argv: Sequence[str],
    num_processes: int,
    devices_per_process: int = 1,
    *,
    platform: str = "cpu",
    env: Mapping[str, str] | None = None,
    timeout: int | float | None = None,
    heartbeat_timeout: int | None = None,
    echo: bool = False,
) -> list[ProcessResult]:
    """Run a command in several processes that find each other through ``initialize``.

    When one fails the others are ended at once: they would wait for it in a collective. SIGTERM and Ctrl-C are handed on to the processes, and
    what they need to save is waited for; a second Ctrl-C ends them at once.

    Args:
        argv: the command, such as ``[sys.executable, "train.py"]``.
        num_processes: how many processes.
        devices_per_process: virtual CPU devices of each.
        platform: JAX_PLATFORMS of the processes.
        env: further environment variables.
        timeout: seconds after which all are ended.
        heartbeat_timeout: as in ``DistributedConfig``, for a process that hangs; None leaves it as it is.
        echo: repeat their output line by line, marked with the process number, while they run.

    Returns:
        One result a process, in order.

    Raises:
        ValueError: no command, or less than one process or device.
        LaunchError: a process failed, or time ran out.
    """
    if not argv:
        raise ValueError("launch_local got an empty command: give the program and its arguments")
    for name, number in (
        ("num_processes", num_processes),
        ("devices_per_process", devices_per_process),
        ("heartbeat_timeout", 1 if heartbeat_timeout is None else heartbeat_timeout),
    ):
        if number < 1:
            raise ValueError(f"launch_local got {name}={number}: give 1 or more")
    address = f"127.0.0.1:{free_port()}"
    common = {
        **os.environ,
        "JAX_PLATFORMS": platform,
        "JAX_NUM_CPU_DEVICES": str(devices_per_process),
        # Without it the coordinator listens on every interface of the machine.
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        **(env or {}),
        VARIABLES["coordinator"]: address,
        VARIABLES["num_processes"]: str(num_processes),
    }
    if heartbeat_timeout is not None:
        common[HEARTBEAT_VARIABLE] = str(heartbeat_timeout)
    children: list[_Child] = []
    try:
        with _signals_handed_on(children) as received:
            for process_id in range(num_processes):
                own = {**common, VARIABLES["process_id"]: str(process_id)}
                child = _Child(argv, own, process_id, echo)
                children.append(child)
                for number in received:  # what came before it was in the list
                    child.hand_on(number)
            first_failed = _wait(children, timeout)
    finally:
        for child in children:
            child.end()
    results = [child.result() for child in children]
    if first_failed is not None:
        result = results[first_failed.process_id]
        code = result.returncode
        how = f"ended with status {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        others = "" if num_processes == 1 or code in STOPPED else ", and the others were ended"
        raise LaunchError(
            f"process {result.process_id} of {num_processes} {how}{others}: {' '.join(argv)}\n{_tail(result)}",
            results,
            status=128 - code if code < 0 else code,
        )
    if any(result.returncode for result in results):
        tails = "\n".join(f"[{result.process_id}] {_tail(result)}" for result in results)
        raise LaunchError(
            f"{num_processes} processes were not done after {timeout} s: {' '.join(argv)}\n{tails}",
            results,
        )
    return results


def free_port() -> int:
    """A TCP port of the loopback interface on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Child:
    """One process in a session of its own, with threads that read its output."""

    def __init__(self, argv: Sequence[str], env: dict[str, str], process_id: int, echo: bool):
        self.process_id = process_id
        self.process = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._lines: tuple[list[str], list[str]] = ([], [])
        self._handed_on: set[int] = set()
        streams = (self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr)
        self._readers = [
            threading.Thread(
                target=self._read, args=(source, lines, sink if echo else None), daemon=True
            )
            for (source, sink), lines in zip(streams, self._lines, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, source, lines, sink):
        with source:
            for line in source:
                lines.append(line)
                if sink is not None:
                    sink.write(f"[{self.process_id}] {line}")
                    sink.flush()

    def hand_on(self, number: int) -> None:
        """Give it a signal, once."""
        if number not in self._handed_on and self.process.poll() is None:
            self._handed_on.add(number)
            self.process.send_signal(number)

    def end(self) -> None:
        """End it, with what it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def result(self) -> ProcessResult:
        for reader in self._readers:
            reader.join(timeout=5)
        stdout, stderr = map("".join, self._lines)
        return ProcessResult(
            process_id=self.process_id,
            returncode=self.process.wait(),
            stdout=stdout,
            stderr=stderr,
        )


def _wait(children: list[_Child], timeout: int | float | None) -> _Child | None:
    """Wait until all are done, one has failed (the first to fail is returned) or time is over."""
    until = None if timeout is None else time.monotonic() + timeout
    first_seen = None
    while until is None or time.monotonic() < until:
        codes = [child.process.poll() for child in children]
        failed = [(child, code) for child, code in zip(children, codes, strict=True) if code]
        if not failed and None not in codes:
            return None
        if failed:
            first_seen = first_seen or time.monotonic()
            # What ended because another one was gone is not the one to name.
            guilty = [(child, code) for child, code in failed if code not in AFTER_A_LOSS]
            seconds = 0
            if not guilty:
                seconds = SECONDS_TO_END
            elif all(code in STOPPED for _, code in guilty):
                seconds = SECONDS_TO_SAVE
            if None not in codes or time.monotonic() - first_seen > seconds:
                return (guilty or failed)[0][0]
        time.sleep(0.02)
    return None


@contextlib.contextmanager
def _signals_handed_on(children: Sequence[_Child]) -> Iterator[list[int]]:
    """Hand SIGTERM and SIGINT on to the processes, which are in sessions of their own; a second SIGINT is a KeyboardInterrupt here.

    Yields:
        The signals that have come, in a list that grows.
    """
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)
        for child in children:
            child.hand_on(number)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {n: signal.signal(n, hand_on) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _tail(result: ProcessResult, lines: int = 20) -> str:
    return "\n".join((result.stdout + result.stderr).splitlines()[-lines:])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, that of the process that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m effscale.parallel.local_launch",
        description="Run a command in several JAX processes on this machine.",
    )
    parser.add_argument("--processes", type=int, default=2, help="how many processes (default 2)")
    parser.add_argument(
        "--devices", type=int, default=1, help="virtual CPU devices of each process (default 1)"
    )
    parser.add_argument("--platform", default="cpu", help="JAX_PLATFORMS (default cpu)")
    parser.add_argument("--timeout", type=float, help="seconds after which all are ended")
    parser.add_argument(
        "--heartbeat-timeout",
        type=int,
        help="seconds without a sign of life after which a process counts as gone (default 30)",
    )
    parser.add_argument("command", nargs="+", help="the command, after --")
    options = parser.parse_args(arguments)
    try:
        launch_local(
            options.command,
            options.processes,
            options.devices,
            platform=options.platform,
            timeout=options.timeout,
            heartbeat_timeout=options.heartbeat_timeout,
            echo=True,
        )
    except ValueError as error:
        parser.error(str(error))
    except LaunchError as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
