import os
import signal
import subprocess
import sys

import pytest

from effscale.parallel.peers import LOST_PEER
from tests.parallel.local_launch import LaunchError, free_port, launch_local, main

SHOW = "import os; print(*(os.environ[n] for n in %r))" % [
    "EFFSCALE_PROCESS_ID",
    "EFFSCALE_NUM_PROCESSES",
    "JAX_NUM_CPU_DEVICES",
    "JAX_PLATFORMS",
    "EXTRA",
    "EFFSCALE_HEARTBEAT_TIMEOUT",
]


def python(code):
    return [sys.executable, "-c", code]


def test_each_process_is_told_its_place():
    results = launch_local(python(SHOW), 3, 2, env={"EXTRA": "x"}, heartbeat_timeout=9)
    assert [r.process_id for r in results] == [0, 1, 2]
    assert [r.stdout for r in results] == [f"{i} 3 2 cpu x 9\n" for i in range(3)]
    assert {r.returncode for r in results} == {0}


def test_a_failure_ends_the_others():
    code = (
        "import os, sys, time\n"
        "if os.environ['EFFSCALE_PROCESS_ID'] == '1': sys.exit('out of luck')\n"
        "time.sleep(600)"
    )
    with pytest.raises(
        LaunchError,
        match=r"process 1 of 2 ended with status 1, and the others were terminated: [\s\S]*out of luck",
    ) as caught:
        launch_local(python(code), 2)
    assert caught.value.results[0].returncode < 0


@pytest.mark.parametrize(
    ("dying", "message"),
    [
        ("os.kill(os.getpid(), 9)", "process 1 of 2 was killed by SIGKILL"),
        ("sys.exit(4)", "process 1 of 2 ended with status 4"),
    ],
)
def test_the_process_that_others_have_lost_is_the_one_that_is_named(tmp_path, dying, message):
    code = (
        "import os, pathlib, sys, time\n"
        f"gone = pathlib.Path({str(tmp_path)!r}, 'gone')\n"
        f"if os.environ['EFFSCALE_PROCESS_ID'] == '1': gone.touch(); time.sleep(0.3); {dying}\n"
        "while not gone.exists(): time.sleep(0.001)\n"
        f"sys.exit({LOST_PEER})"
    )
    with pytest.raises(LaunchError, match=message):
        launch_local(python(code), 2)


def test_a_signal_is_handed_on_and_what_it_saves_is_waited_for(capfd):
    code = (
        "import os, signal, sys, time\n"
        "def save(*_): time.sleep(0.2); print('saved', flush=True); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)"
    )
    assert main(["--processes", "1", "--heartbeat-timeout", "7", "--", *python(code)]) == 143
    assert capfd.readouterr().out == "[0] saved\n"


def test_a_signal_that_comes_while_a_process_starts_reaches_it(monkeypatch):
    """A process may be quicker than the launcher, which has not noted it yet."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    start = subprocess.Popen

    def slow(*args, **kwargs):
        process = start(*args, **kwargs)
        assert process.stdout.readline() == "ready\n"
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", slow)
    assert main(["--processes", "1", "--", *python(code)]) == 143


def test_time_runs_out():
    with pytest.raises(LaunchError, match=r"1 processes did not finish within 0.2 s"):
        launch_local(python("import time; time.sleep(600)"), 1, timeout=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 2), "empty command"),
        ((["true"], 0), "num_processes must be 1 or more, got 0"),
        ((["true"], 1, 0), "devices_per_process must be 1 or more, got 0"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        launch_local(*arguments)


def test_command_line(capfd):
    assert (
        main(["--processes", "2", "--", *python("import sys; print('hi', sys.argv[1])"), "-v"]) == 0
    )
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] hi -v", "[1] hi -v"]
    assert main(["--processes", "1", "--", *python("raise SystemExit(3)")]) == 3
    assert "process 0 of 1 ended with status 3" in capfd.readouterr().err


def test_free_port_is_a_port():
    assert 0 < free_port() < 65536
