"""The same global batch gives the same loss curve, however the devices are laid out."""

import json

import jax
import numpy as np
import pytest

from effscale.parallel import MeshConfig
from tests.parallel.local_launch import json_of_each
from tests.parallel.mlp_curve import curve


@pytest.fixture(scope="module")
def reference():
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
def test_eight_devices(reference, sizes):
    np.testing.assert_allclose(curve(MeshConfig(**sizes)), reference, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"data": 8}, [[0, 2], [1, 2]]),
        ({"data": 1, "fsdp": 4, "tensor": 2}, [[0, 2], [1, 2]]),
        pytest.param({"data": 1, "tensor": 8}, [[0, 1], [0, 1]], marks=pytest.mark.slow),
    ],
    ids=["data", "fsdp and tensor", "tensor over both"],
)
def test_two_processes(reference, sizes, parts):
    results = json_of_each("tests.parallel.mlp_curve", json.dumps(sizes))
    for found, part in zip(results, parts, strict=True):
        np.testing.assert_allclose(found.pop("losses"), reference, rtol=1e-5)
        assert found == {"several": True, "again": True, "devices": 8, "part": part}


def test_two_processes_lay_out_a_tree_of_their_own():
    sizes = json.dumps({"data": 1, "fsdp": 4, "tensor": 2})
    assert json_of_each("tests.parallel.mlp_curve", sizes, "--place") == [{"placed": True}] * 2
