"""The scripts on the page about clusters, as far as they can be checked without one."""

import inspect
import math
import os
import pathlib
import re
import shlex
import subprocess

import pytest

from effscale.command.line import parse
from effscale.experiments.quickstart import PRESETS, Config
from effscale.parallel import startup

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "clusters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|yaml)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SCRIPTS = [text for kind, text in BLOCKS if kind == "bash"]


def check(script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_sound_shell(script):
    check(script)


def test_the_job_set_asks_for_a_whole_slice():
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the manifest")
    (text,) = [text for kind, text in BLOCKS if kind == "yaml"]
    jobs = yaml.safe_load(text)["spec"]["replicatedJobs"]
    job = jobs[0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    per_host = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == chips // per_host
    assert {mount["name"] for mount in container["volumeMounts"]} <= {
        volume["name"] for volume in pod["volumes"]
    }
    (script,) = container["args"]
    check(script)


def test_the_options_of_the_commands_exist():
    """Those after the program's name, and those that a script puts there."""
    given = re.findall(r"(?:set -- |options=\(|quickstart )(--[^\n]*?)\)?'?$", PAGE, re.MULTILINE)
    assert len(given) == 9
    for options in given:
        words = shlex.split(options.replace('"$RUN"', "/runs/gpt").replace("$RUN", "/runs/gpt"))
        if "--resume" in words:  # takes the rest from the run, which is not here
            assert [words[0], *words[2:]] == ["--out", "--resume"]
            assert words[1].endswith("/runs/gpt")
            continue
        config = parse(PRESETS, "", words)
        assert isinstance(config, Config)
        assert config.batch_size == PRESETS["paper"].batch_size
        assert os.fspath(config.out).endswith("/runs/gpt")
        assert config.mesh.fsdp in (8, 64)


def test_the_variables_are_those_that_are_read():
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \|", PAGE, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"[A-Z_]{4,}", row)}
    own = {*startup.VARIABLES.values(), startup.HEARTBEAT_VARIABLE}
    assert own <= named
    asked = inspect.getsource(startup.cluster_found)
    assert all(f'"{name}"' in asked for name in named - own)
