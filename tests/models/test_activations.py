"""Activations and their slopes against PyTorch's. Whole models are compared where they are loaded: tests/interop/test_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.models.activations import ACTIVATIONS

torch = pytest.importorskip("torch", reason="the oracle of these tests is PyTorch")
hf = pytest.importorskip("transformers", reason="the oracle of these tests is transformers")

pytestmark = pytest.mark.exact


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_its_slope(name):
    names = {"gelu_tanh": "gelu_new", "gelu_bloom": "gelu_new"}
    x = torch.linspace(-8, 8, 240, requires_grad=True)  # without the kinks at 0 and 6
    y = hf.activations.ACT2FN[names.get(name, name)](x)
    y.sum().backward()
    slope = jax.vmap(jax.value_and_grad(ACTIVATIONS[name]))
    for found, expected in zip(slope(jnp.asarray(x.detach().numpy())), (y, x.grad), strict=True):
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=5e-6)
