"""Signs as bits: packing, and the two steps of the exchange, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas import sign_compress
from kernels_pallas.sign_compress.reference import pack, unpack


@given(batch=st.integers(1, 3), width=st.integers(1, 20), seed=st.integers(0, 1000))
def test_unpack_undoes_pack(batch, width, seed):
    signs = np.random.default_rng(seed).integers(0, 2, (batch, 8, width)).astype(bool)
    bits = jax.jit(pack)(signs)
    assert bits.shape == (batch, width)
    np.testing.assert_array_equal(jax.jit(unpack)(bits), signs)
    np.testing.assert_array_equal(bits, np.packbits(signs, axis=1)[:, 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [96, 81, 1, 0])
def test_compress(dtype, size):
    rng = np.random.default_rng(size)
    x = jnp.asarray(rng.normal(size=(3, 8, 4)), dtype)
    last = rng.normal(size=(3, 8, 4)).astype(np.float32)
    bits, corrected, squares = sign_compress.compress(
        x, jnp.asarray(last), jnp.float32(0.7), size=size
    )
    expected = np.asarray(x, np.float32) + last - np.where(last >= 0, 0.7, -0.7).astype(np.float32)
    expected.ravel()[size:] = 0
    np.testing.assert_allclose(corrected, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(bits, np.packbits(np.asarray(corrected) >= 0, axis=1)[:, 0])
    np.testing.assert_allclose(squares, (expected**2).sum(), rtol=1e-5)


@pytest.mark.parametrize("size", [32, 17, 0])
def test_average(size):
    rng = np.random.default_rng(size)
    signs = rng.integers(0, 2, (5, 8, 4)).astype(bool)
    scales = rng.uniform(0.1, 2, 5).astype(np.float32)
    last = rng.normal(size=(8, 4)).astype(np.float32)
    bits, corrected, squares = sign_compress.average(
        pack(jnp.asarray(signs)), jnp.asarray(scales), jnp.asarray(last), jnp.float32(0.3), jnp.int32(size)
    )  # fmt: skip
    mean = (np.where(signs, 1, -1) * scales[:, None, None]).mean(0)
    expected = mean + last - np.where(last >= 0, 0.3, -0.3)
    expected.ravel()[size:] = 0
    np.testing.assert_allclose(corrected, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(bits, np.packbits(np.asarray(corrected) >= 0, axis=0)[0])
    np.testing.assert_allclose(squares, (expected**2).sum(), rtol=1e-5)


def test_bad_input():
    zeros = jnp.zeros((2, 8, 4))
    with pytest.raises(ValueError, match="with size 8 for the last but one, got"):
        sign_compress.compress(jnp.zeros((2, 4, 4)), jnp.zeros((2, 4, 4)), jnp.float32(0), size=1)
    with pytest.raises(ValueError, match=r"corrected must have the shape of x, .*, got"):
        sign_compress.compress(zeros, jnp.zeros((1, 8, 4)), jnp.float32(0), size=1)
    with pytest.raises(ValueError, match="size must be between 0 and the 64 elements of x, got 65"):
        sign_compress.compress(zeros, zeros, jnp.float32(0), size=65)
    with pytest.raises(ValueError, match=r"bits must be \[workers, bytes\], .*, got \(2, 4\)"):
        sign_compress.average(
            jnp.zeros((2, 4), jnp.uint8), jnp.ones(3), zeros[0], jnp.float32(0), jnp.int32(1)
        )
