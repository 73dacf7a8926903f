"""The same global batch gives the same loss curve, however the devices are laid out."""

import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from effscale.parallel import MeshConfig
from tests.parallel.local_launch import free_port, launch_local

SCRIPT = pathlib.Path(__file__).with_name("mlp_curve.py")


@pytest.fixture(scope="module")
def curve():
    spec = importlib.util.spec_from_file_location("mlp_curve", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.curve


@pytest.fixture(scope="module")
def reference(curve):
    losses = curve(MeshConfig(), jax.devices()[:1])
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 5
    return losses


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8},
        {"data": 1, "fsdp": 8},
        {"data": 1, "tensor": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    ],
    ids=lambda sizes: "-".join(f"{axis}{size}" for axis, size in sizes.items()),
)
def test_eight_devices(curve, reference, sizes):
    np.testing.assert_allclose(curve(MeshConfig(**sizes)), reference, rtol=1e-5)


@pytest.fixture
def loopback():
    try:
        free_port()
    except OSError as error:
        pytest.skip(f"processes cannot meet: no socket on the loopback interface ({error})")


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"data": 8}, [[0, 2], [1, 2]]),
        ({"data": 1, "fsdp": 4, "tensor": 2}, [[0, 2], [1, 2]]),
        pytest.param({"data": 1, "tensor": 8}, [[0, 1], [0, 1]], marks=pytest.mark.slow),
    ],
    ids=["data", "fsdp and tensor", "tensor over both"],
)
@pytest.mark.usefixtures("loopback")
def test_two_processes(reference, sizes, parts):
    command = [sys.executable, str(SCRIPT), json.dumps(sizes)]
    results = launch_local(command, 2, devices_per_process=4, timeout=300)
    for result, part in zip(results, parts, strict=True):
        line = next(line for line in result.stdout.splitlines() if line.startswith("{"))
        found = json.loads(line)
        np.testing.assert_allclose(found.pop("losses"), reference, rtol=1e-5)
        assert found == {"several": True, "again": True, "devices": 8, "part": part}


@pytest.mark.usefixtures("loopback")
def test_two_processes_lay_out_a_tree_of_their_own():
    sizes = json.dumps({"data": 1, "fsdp": 4, "tensor": 2})
    command = [sys.executable, str(SCRIPT), sizes, "--place"]
    for result in launch_local(command, 2, devices_per_process=4, timeout=300):
        assert '{"placed": true}' in result.stdout
