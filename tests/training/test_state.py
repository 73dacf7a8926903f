import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.training.state import Counter


@given(st.integers(0, 2**63), st.lists(st.integers(0, 2**32 - 1), max_size=5))
def test_sums_are_exact_beyond_32_bits(start, amounts):
    counter = Counter.of(start)
    for amount in amounts:
        counter = counter.add(np.uint32(amount))
    assert int(counter) == start + sum(amounts)


@given(st.integers(0, 2**64 - 1))
def test_float32_is_near(value):
    assert float(Counter.of(value).to_float32()) == pytest.approx(value, rel=2e-7)


def test_counts_under_jit_with_static_and_traced_amounts():
    counter = Counter.of(2**31 - 5)
    step = jax.jit(lambda counter, amount: counter.add(amount).add(1_000_000))
    for _ in range(3):
        counter = step(counter, jnp.int32(2**31 - 1))
    assert int(counter) == 2**31 - 5 + 3 * (2**31 - 1 + 1_000_000)


@pytest.mark.parametrize("value", [-1, 2**64])
def test_out_of_range(value):
    with pytest.raises(ValueError, match=str(value)):
        Counter.of(value)
