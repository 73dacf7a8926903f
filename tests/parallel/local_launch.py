"""Run several JAX processes on one machine, to try out and test multi-process programs.

``python -m tests.parallel.local_launch --processes 2 --devices 4 -- python train.py`` starts ``train.py`` twice,
each with four virtual CPU devices. The program must call ``effscale.parallel.initialize`` first.
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
"""Exit statuses of a process that was asked to stop and has saved its state; the others are saving, too."""

AFTER_A_LOSS = (LOST_PEER, -signal.SIGABRT)
"""Exit statuses of a process that ended because another one was lost."""

SECONDS_TO_SAVE = 60

SECONDS_TO_END = 2
"""Time that a lost process has to exit by itself: the other processes can notice its failure before it has ended."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessResult:
    """The outcome of one process."""

    process_id: int
    """Number of the process, from 0."""
    returncode: int
    """Exit status; negative: the number of the signal that ended it."""
    stdout: str
    """Everything it wrote to standard output."""
    stderr: str
    """Everything it wrote to standard error."""


class LaunchError(RuntimeError):
    """A process failed or the time ran out; the message contains the end of its output.

    Attributes:
        results: The outcomes of the processes.
        status: The exit status of the failed process as a shell reports it; 1 if the time ran out.
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
    """Run a command in several processes that connect to each other through ``initialize``.

    When one fails, the others are terminated at once, because they would wait for it in a collective. SIGTERM and Ctrl-C are
    forwarded to the processes, which get the time they need to save; a second Ctrl-C terminates them immediately.

    Args:
        argv: The command, such as ``[sys.executable, "train.py"]``.
        num_processes: Number of processes.
        devices_per_process: Virtual CPU devices of each process.
        platform: JAX_PLATFORMS of the processes.
        env: Additional environment variables.
        timeout: Seconds after which all processes are terminated.
        heartbeat_timeout: As in ``DistributedConfig``, for a process that hangs; None keeps the default.
        echo: Repeat their output line by line while they run, prefixed with the process number.

    Returns:
        One result per process, in order.

    Raises:
        ValueError: The command is empty, or there is less than one process or device.
        LaunchError: A process failed, or the time ran out.
    """
    if not argv:
        raise ValueError("argv must contain the program and its arguments, got an empty command")
    for name, number in (
        ("num_processes", num_processes),
        ("devices_per_process", devices_per_process),
        ("heartbeat_timeout", 1 if heartbeat_timeout is None else heartbeat_timeout),
    ):
        if number < 1:
            raise ValueError(f"{name} must be 1 or more, got {number}")
    address = f"127.0.0.1:{free_port()}"
    common = {
        **os.environ,
        "JAX_PLATFORMS": platform,
        "JAX_NUM_CPU_DEVICES": str(devices_per_process),
        # By default, the coordinator listens on every network interface of the machine.
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
                for number in received:  # signals that came before it was in the list
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
        others = "" if num_processes == 1 or code in STOPPED else ", and the others were terminated"
        raise LaunchError(
            f"process {result.process_id} of {num_processes} {how}{others}: {' '.join(argv)}\n{_tail(result)}",
            results,
            status=128 - code if code < 0 else code,
        )
    if any(result.returncode for result in results):
        tails = "\n".join(f"[{result.process_id}] {_tail(result)}" for result in results)
        raise LaunchError(
            f"{num_processes} processes did not finish within {timeout} s: {' '.join(argv)}\n{tails}",
            results,
        )
    return results


def free_port() -> int:
    """Return a TCP port of the loopback interface that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Child:
    """One process in a separate session, with threads that read its output."""

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
        """Forward a signal to the process, once."""
        if number not in self._handed_on and self.process.poll() is None:
            self._handed_on.add(number)
            self.process.send_signal(number)

    def end(self) -> None:
        """End the process and everything it has started."""
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
    """Wait until all have finished, one has failed (the first to fail is returned), or the time is over."""
    until = None if timeout is None else time.monotonic() + timeout
    first_seen = None
    while until is None or time.monotonic() < until:
        codes = [child.process.poll() for child in children]
        failed = [(child, code) for child, code in zip(children, codes, strict=True) if code]
        if not failed and None not in codes:
            return None
        if failed:
            first_seen = first_seen or time.monotonic()
            # A process that ended because another one was lost is not the one to report.
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
    """Forward SIGTERM and SIGINT to the processes, which are in separate sessions; a second SIGINT raises KeyboardInterrupt here.

    Yields:
        The signals received so far, in a list that grows.
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
    """Run the command line and return the exit status, that of the process that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.parallel.local_launch",
        description="Run a command in several JAX processes on this machine.",
    )
    parser.add_argument("--processes", type=int, default=2, help="number of processes (default 2)")
    parser.add_argument(
        "--devices", type=int, default=1, help="virtual CPU devices of each process (default 1)"
    )
    parser.add_argument("--platform", default="cpu", help="JAX_PLATFORMS (default cpu)")
    parser.add_argument(
        "--timeout", type=float, help="seconds after which all processes are terminated"
    )
    parser.add_argument(
        "--heartbeat-timeout",
        type=int,
        help="seconds without a heartbeat after which a process counts as lost (default 30)",
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
