"""A GPT's loss curve is the same on one device, on eight in any layout, and on two processes."""

import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from effscale.parallel import MeshConfig
from tests.parallel.local_launch import free_port, launch_local

SCRIPT = pathlib.Path(__file__).with_name("gpt_curve.py")


@pytest.fixture(scope="module")
def curve():
    spec = importlib.util.spec_from_file_location("gpt_curve", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.curve


@pytest.fixture(scope="module")
def reference(curve):
    losses = curve(MeshConfig(), jax.devices()[:1])
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5, "a curve that does not fall would agree too easily"
    return losses


def test_eight_devices(curve, reference):
    """Layouts with fsdp or tensor are below."""
    np.testing.assert_allclose(curve(MeshConfig(data=8)), reference, rtol=1e-5)


def test_micro_batches_give_the_same_curve(curve, reference):
    losses = curve(MeshConfig(data=4), jax.devices()[:4], accumulate=4)
    np.testing.assert_allclose(losses, reference, rtol=1e-5)


def test_a_checkpoint_of_one_mesh_resumes_on_another(curve, reference, tmp_path):
    losses = curve(MeshConfig(data=1, fsdp=8), stop=7, folder=tmp_path)
    losses += curve(MeshConfig(data=2, tensor=4), stop=13, folder=tmp_path)
    losses += curve(MeshConfig(), jax.devices()[:1], folder=tmp_path)
    np.testing.assert_allclose(losses, reference, rtol=1e-5)


@pytest.mark.slow  # quickstart in two processes, and every layout of an MLP in two (tests/parallel/test_curves.py), are quick
def test_two_processes(reference):
    """Each of the three axes has two parts, and data's are in different processes."""
    try:
        free_port()
    except OSError as error:
        pytest.skip(f"processes cannot meet: no socket on the loopback interface ({error})")
    command = [sys.executable, str(SCRIPT), json.dumps({"data": 2, "fsdp": 2, "tensor": 2})]
    for result in launch_local(command, 2, devices_per_process=4, timeout=300):
        line = next(line for line in result.stdout.splitlines() if line.startswith('{"losses"'))
        np.testing.assert_allclose(json.loads(line)["losses"], reference, rtol=1e-5)
