"""The analysis on a cluster: a local one."""

import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow  # starting a cluster takes most of it
def test_ray_makes_the_same_index():
    pytest.importorskip("ray", reason="ray is not installed (extra: ray)")
    program = pathlib.Path(__file__).parent / "ray_analysis.py"
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "same as without Ray" in done.stdout
