"""A GPT's loss curve is the same on one device, on eight in any layout, and on two processes."""

import json

import jax
import numpy as np
import pytest

from effscale.parallel import MeshConfig
from tests.parallel.local_launch import json_of_each
from tests.training.gpt_curve import curve


@pytest.fixture(scope="module")
def reference():
    losses = curve(MeshConfig(), jax.devices()[:1])
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5, "a curve that does not fall would agree too easily"
    return losses


def test_eight_devices(reference):
    """Layouts with fsdp or tensor are below."""
    np.testing.assert_allclose(curve(MeshConfig(data=8)), reference, rtol=1e-5)


def test_micro_batches_give_the_same_curve(reference):
    losses = curve(MeshConfig(data=4), jax.devices()[:4], accumulate=4)
    np.testing.assert_allclose(losses, reference, rtol=1e-5)


def test_a_checkpoint_of_one_mesh_resumes_on_another(reference, tmp_path):
    losses = curve(MeshConfig(data=1, fsdp=8), stop=7, folder=tmp_path)
    losses += curve(MeshConfig(data=2, tensor=4), stop=13, folder=tmp_path)
    losses += curve(MeshConfig(), jax.devices()[:1], folder=tmp_path)
    np.testing.assert_allclose(losses, reference, rtol=1e-5)


@pytest.mark.slow  # quickstart in two processes, and every layout of an MLP in two (tests/parallel/test_curves.py), are quick
def test_two_processes(reference):
    """Each of the three axes has two parts, and data's are in different processes."""
    mesh = json.dumps({"data": 2, "fsdp": 2, "tensor": 2})
    for found in json_of_each("tests.training.gpt_curve", mesh):
        np.testing.assert_allclose(found["losses"], reference, rtol=1e-5)
