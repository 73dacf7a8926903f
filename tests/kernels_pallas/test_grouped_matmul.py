"""The product of grouped rows, with its gradient, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_matmul
from kernels_pallas.grouped_matmul.api import check_operands

GROUPS, D_IN, D_OUT = 5, 6, 7
IMPLEMENTATIONS = ("reference", "buffers", "ragged_dot")
SIZES = {
    "even": [20, 20, 20, 20, 20],
    "one has all": [0, 0, 100, 0, 0],
    "some have none": [1, 0, 33, 0, 66],
    "rows of none": [3, 40, 0, 9, 17],
    "nobody": [0, 0, 0, 0, 0],
}


def operands(dtype="float32"):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return make(100, D_IN), make(GROUPS, D_IN, D_OUT), make(GROUPS, D_OUT), make(100, D_OUT)


def slow(x, weight, sizes, bias):
    """The product, and the gradients of its sum with ``g``."""
    mine = np.repeat(np.arange(GROUPS), sizes)
    rows = len(mine)
    y = np.zeros((len(x), D_OUT))
    y[:rows] = np.einsum("ri,rio->ro", x[:rows], weight[mine]) + bias[mine]

    def gradients(g):
        to_x, to_w, to_b = np.zeros_like(x), np.zeros_like(weight), np.zeros_like(bias)
        to_x[:rows] = np.einsum("ro,rio->ri", g[:rows], weight[mine])
        for row, group in enumerate(mine):
            to_w[group] += np.outer(x[row], g[row])
            to_b[group] += g[row]
        return to_x, to_w, to_b

    return y, gradients


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_against_numpy(implementation, sizes):
    x, weight, bias, g = operands()
    sizes = jnp.asarray(sizes, jnp.int32)

    @jax.jit
    def run(x, weight, bias):
        call = lambda *a: grouped_matmul(a[0], a[1], sizes, a[2], implementation=implementation)
        y, back = jax.vjp(call, x, weight, bias)
        return y, back(g)

    y, grads = run(x, weight, bias)
    expected, gradients = slow(
        *(np.asarray(a, np.float64) for a in (x, weight)), sizes, np.asarray(bias)
    )
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for a, b in zip(grads, gradients(np.asarray(g)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_sums_are_float32():
    x, weight, bias, _ = operands("bfloat16")
    sizes = jnp.array(SIZES["even"])
    exact = slow(
        *(np.asarray(a, np.float64) for a in (x, weight)),
        SIZES["even"],
        np.asarray(bias, np.float64),
    )[0]
    y = jax.jit(grouped_matmul)(x, weight, sizes, bias)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_without_a_bias():
    x, weight, bias, _ = operands()
    sizes = jnp.array(SIZES["rows of none"])
    plain = jax.jit(grouped_matmul)(x, weight, sizes)
    zero = jax.jit(grouped_matmul)(x, weight, sizes, jnp.zeros_like(bias))
    np.testing.assert_array_equal(plain, zero)


def test_each_platform_gets_its_own():
    """Programs for TPUs hold the ragged product, which XLA has a kernel for there; others hold the loops."""
    x, weight, _, _ = operands()
    traced = jax.jit(grouped_matmul).trace(x, weight, jnp.array(SIZES["even"]))
    text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    assert "ragged_dot" in text["tpu"]
    assert "while" not in text["tpu"]
    assert "while" in text["cpu"]
    assert "ragged_dot" not in text["cpu"]


def test_bad_input():
    x, weight, bias, _ = operands()
    sizes = jnp.array(SIZES["even"])
    with pytest.raises(
        ValueError, match=r"x must have the 6 inputs of weight .*, got the shape \(100, 5\)"
    ):
        check_operands(x[:, :5], weight, sizes, None)
    with pytest.raises(
        ValueError,
        match=r"sizes must have one entry for each of the 5 groups .*, got the shape \(4,\)",
    ):
        check_operands(x, weight, sizes[:4], None)
    with pytest.raises(ValueError, match=r"bias must have the shape \(5, 7\), got \(5, 6\)"):
        check_operands(x, weight, sizes, bias[:, :6])
    with pytest.raises(ValueError, match="weight must have the dtype of x, bfloat16, got float32"):
        grouped_matmul(x.astype(jnp.bfloat16), weight, sizes)
