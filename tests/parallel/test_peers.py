import pathlib
import subprocess
import sys

import pytest

from effscale.parallel.peers import LOST_PEER, ending_together, on_first
from tests.parallel.local_launch import environments

PROGRAM = pathlib.Path(__file__).with_name("lost_peer.py")


def both(*words):
    """What becomes of two processes that nobody ends from outside: status, stdout and stderr of each, and their pids."""
    command = [sys.executable, str(PROGRAM), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=each, **pipes) for each in environments(2)]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)], [
        p.pid for p in processes
    ]


def test_the_survivor_of_a_killed_process_says_which_one_is_gone():
    (survivor, killed), (_, pid) = both("killed", "1")
    assert killed[0] == -9
    assert survivor[0] == LOST_PEER, survivor[2]
    assert f"error: process 1 of 2 (pid {pid} on " in survivor[2]
    assert survivor[2].endswith(" was lost; see its output; start again\n")
    assert "Traceback" not in survivor[2]
    # Before that, process 0 could not make a folder.
    assert "FileExistsError the folder is taken\n" in survivor[1]
    assert "RuntimeError the folder is taken\n" in killed[1]


def test_a_process_that_fails_does_not_leave_the_other_waiting():
    (failed, survivor), _ = both("failed", "0")
    assert failed[0] == 1
    assert "ValueError: bad luck" in failed[2]
    assert survivor[0] == LOST_PEER, survivor[2]
    assert survivor[2].endswith("error: process 0 of 2 failed; see its output; start again\n")


def test_a_single_process_fails_as_ever():
    assert on_first(lambda: 3) == 3
    for error in (ValueError("Gloo all-reduce failed"), SystemExit(2), KeyboardInterrupt()):
        with pytest.raises(type(error)), ending_together():
            raise error
