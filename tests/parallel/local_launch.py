"""Run a program in several JAX processes on this machine.

``python -m tests.parallel.local_launch --processes 2 --devices 4 -- python train.py`` starts ``train.py`` twice,
each with four virtual CPU devices. The program must call ``effscale.parallel.initialize`` first.
"""

import argparse
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import pytest

from effscale.parallel.peers import LOST_PEER
from effscale.parallel.startup import VARIABLES

ROOT = pathlib.Path(__file__).resolve().parents[2]
AFTER_A_LOSS = (LOST_PEER, -signal.SIGABRT)
"""Exit statuses of a process that ended because another one was lost, which has two seconds to end by itself."""


class LaunchError(RuntimeError):
    """A process failed or the time ran out; the message has the end of its output, ``results`` those of all processes."""

    def __init__(self, message: str, results: list[subprocess.CompletedProcess[str]], status: int):
        super().__init__(message)
        self.results, self.status = results, status


def environments(num_processes: int, devices_per_process: int = 1) -> list[dict[str, str]]:
    """The environments in which ``initialize`` connects so many processes to each other."""
    address = f"127.0.0.1:{free_port()}"
    common = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices_per_process),
        # By default, the coordinator listens on every network interface of the machine.
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        VARIABLES["coordinator"]: address,
        VARIABLES["num_processes"]: str(num_processes),
    }
    return [common | {VARIABLES["process_id"]: str(i)} for i in range(num_processes)]


def launch_local(
    argv: Sequence[str], num_processes: int, devices_per_process: int = 1, *, timeout: float = 300
) -> list[subprocess.CompletedProcess[str]]:
    """Run a command in several processes; when one fails, the others are killed, as they would wait for it."""
    with tempfile.TemporaryDirectory() as folder:
        return _launch(
            list(argv), environments(num_processes, devices_per_process), folder, timeout
        )


def _launch(argv: list[str], each: list[dict[str, str]], folder: str, timeout: float):
    processes, until = [], time.monotonic() + timeout
    paths = [[pathlib.Path(folder, f"{i}.{kind}") for kind in "oe"] for i in range(len(each))]
    try:
        for environment, (out, err) in zip(each, paths, strict=True):
            with open(out, "w") as out, open(err, "w") as err:
                options = {"stdin": subprocess.DEVNULL, "start_new_session": True, "cwd": ROOT}
                processes.append(
                    subprocess.Popen(argv, env=environment, stdout=out, stderr=err, **options)
                )
        guilty = _wait(processes, until)
    finally:
        running = [process for process in processes if process.poll() is None]
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    results = [
        subprocess.CompletedProcess(
            argv, process.returncode, *(p.read_text(errors="replace") for p in pair)
        )
        for process, pair in zip(processes, paths, strict=True)
    ]
    if guilty is None and not running:
        return results
    number, code = (0, 1) if guilty is None else (guilty, processes[guilty].returncode)
    what = f"{len(each)} processes did not finish within {timeout} s"
    if guilty is not None:
        how = (
            f"ended with status {code}"
            if code > 0
            else f"was killed by {signal.Signals(-code).name}"
        )
        what = f"process {number} of {len(each)} {how}"
    tail = "\n".join((results[number].stdout + results[number].stderr).splitlines()[-20:])
    message = f"{what}: {' '.join(argv)}\n{tail}"
    raise LaunchError(message, results, 128 - code if code < 0 else code)


def _wait(processes: Sequence[subprocess.Popen], until: float) -> int | None:
    """The number of the process that failed, as soon as one has; None if all are done or the time is over."""
    lost_at = None
    while time.monotonic() < until:
        codes = [process.poll() for process in processes]
        failed = [number for number, code in enumerate(codes) if code]
        if not failed and None not in codes:
            return None
        guilty = [number for number in failed if codes[number] not in AFTER_A_LOSS]
        lost_at = lost_at or (time.monotonic() if failed else None)
        if guilty or (failed and (None not in codes or time.monotonic() > lost_at + 2)):
            return (guilty or failed)[0]
        time.sleep(0.02)
    return None


def json_of_each(module: str, *words: str, processes: int = 2, devices: int = 4) -> list[Any]:
    """The line of JSON that each process of a program prints; skips a test where processes cannot meet."""
    try:
        free_port()
    except OSError as error:
        pytest.skip(f"processes cannot meet: no socket on the loopback interface ({error})")
    results = launch_local([sys.executable, "-m", module, *words], processes, devices)
    lines = [result.stdout.splitlines() for result in results]
    return [json.loads(next(x for x in own if x.startswith("{"))) for own in lines]


def free_port() -> int:
    """Return a TCP port of the loopback interface that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status, that of the process that failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.parallel.local_launch")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices of each")
    parser.add_argument("command", nargs="+", help="the command, after --")
    options = parser.parse_args(arguments)
    try:
        launch_local(options.command, options.processes, options.devices, timeout=900)
    except LaunchError as error:
        print(error, file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
