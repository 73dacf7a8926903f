"""The loss curve of a model with experts is the same wherever its experts are, and goes on from a checkpoint on another mesh."""

import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from effscale.parallel import MeshConfig
from effscale.parallel.local_launch import free_port, launch_local

SCRIPT = pathlib.Path(__file__).with_name("moe_curve.py")


@pytest.fixture(scope="module")
def curve():
    spec = importlib.util.spec_from_file_location("moe_curve", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.curve


@pytest.fixture(scope="module")
def reference(curve):
    losses = curve(MeshConfig(), jax.devices()[:1])
    assert losses[-1] < losses[0] - 0.5, "a curve that does not fall would agree too easily"
    return losses


def test_a_checkpoint_goes_on_with_experts_on_other_devices(curve, reference, tmp_path):
    """From one expert on each device to all on one: with the optimizer's state, or the curve would be another."""
    losses = curve(MeshConfig(data=1, expert=8), stop=3, folder=tmp_path)
    losses += curve(MeshConfig(data=1, fsdp=2, expert=2, tensor=2), stop=6, folder=tmp_path)
    losses += curve(MeshConfig(), jax.devices()[:1], folder=tmp_path)
    np.testing.assert_allclose(losses, reference, rtol=1e-5)


@pytest.mark.slow  # tests/moe/test_meshes.py has the same exchange on one process's devices, and is quick
def test_two_processes(reference):
    """Tokens travel to the experts of the other process, within each process first."""
    try:
        free_port()
    except OSError as error:
        pytest.skip(f"processes cannot meet: no socket on the loopback interface ({error})")
    command = [sys.executable, str(SCRIPT), json.dumps({"data": 1, "expert": 8})]
    for result in launch_local(command, 2, devices_per_process=4, timeout=300):
        line = next(line for line in result.stdout.splitlines() if line.startswith('{"losses"'))
        np.testing.assert_allclose(json.loads(line)["losses"], reference, rtol=1e-5)
