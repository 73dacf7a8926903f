"""The launcher that tests start several processes with."""

import sys

import pytest

from effscale.parallel.peers import LOST_PEER
from effscale.parallel.startup import VARIABLES
from tests.parallel.local_launch import LaunchError, launch_local, main

NAMES = (VARIABLES["process_id"], VARIABLES["num_processes"], "JAX_NUM_CPU_DEVICES")


def python(code):
    return [sys.executable, "-c", f"import os, pathlib, sys, time\n{code}"]


def test_each_process_is_told_its_place():
    results = launch_local(python(f"print(*(os.environ[n] for n in {NAMES}))"), 3, 2)
    assert [result.stdout for result in results] == [f"{i} 3 2\n" for i in range(3)]
    assert {result.returncode for result in results} == {0}


@pytest.mark.parametrize(
    ("dying", "other", "message"),
    [
        ("sys.exit('out of luck')", "time.sleep(600)", "ended with status 1: [\\s\\S]*out of luck"),
        ("os.kill(os.getpid(), 9)", f"sys.exit({LOST_PEER})", "was killed by SIGKILL"),
    ],
    ids=["that waits", "that has lost it"],
)
def test_a_failure_is_named_and_ends_the_other_process(tmp_path, dying, other, message):
    code = (
        f"gone = pathlib.Path({str(tmp_path)!r}, 'gone')\n"
        f"if os.environ[{NAMES[0]!r}] == '1': gone.touch(); time.sleep(0.3); {dying}\n"
        "while not gone.exists(): time.sleep(0.001)\n"
        f"{other}"
    )
    with pytest.raises(LaunchError, match=f"process 1 of 2 {message}") as caught:
        launch_local(python(code), 2)
    assert all(result.returncode for result in caught.value.results)


def test_time_runs_out():
    with pytest.raises(LaunchError, match=r"1 processes did not finish within 0.2 s"):
        launch_local(python("time.sleep(600)"), 1, timeout=0.2)


def test_command_line(capfd):
    assert main(["--processes", "2", "--", *python("raise SystemExit(3)"), "-v"]) == 3
    assert "of 2 ended with status 3" in capfd.readouterr().err
