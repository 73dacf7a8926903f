"""The object that says how gradients are clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effscale.optim import onebit_adam, onebit_lamb, zero_one_adam
from effscale.training import Clip, make_train_step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": 0.0}, r"norm must be a positive, finite number, got .*norm=0\.0"),
        ({"norm": float("inf")}, "norm=inf"),
        ({"norm": jnp.float32("nan")}, "norm=Array"),
        ({"norm": "abc"}, "norm='abc'"),
        ({"norm": 1.0, "by": "globally"}, "by must be one of synchronized, local, got 'globally'"),
    ],
)
def test_what_cannot_be_is_refused(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Clip(**options)


def test_a_number_is_answered_with_the_object(unchecked):
    loss = lambda model, batch, key: None
    for make in (
        lambda: make_train_step(loss, optax.sgd(1.0), clip=1.0),
        lambda: onebit_adam(1.0, clip=1.0),
        lambda: onebit_lamb(1.0, clip=1.0),
        lambda: zero_one_adam(1.0, clip=1.0),
    ):
        with pytest.raises(
            ValueError, match=r"clip must be a Clip or None, got 1\.0\. Use clip=Clip\(1\.0\)"
        ):
            make()
    with pytest.raises(ValueError, match=r"got 8. Use workers=Workers\('data'\)"):
        onebit_adam(1e-3, freeze_step=2, workers=8)
    with pytest.raises(ValueError, match=r"Use workers=Workers\('data'\)"):
        onebit_lamb(1.0, workers="data")


def test_a_norm_from_a_schedule():
    """What the changelog advises for a norm that changes: it is traced, and clips as that number does."""
    schedule = lambda count: jnp.where(count < 2, 1.0, 0.5)
    clipped = optax.inject_hyperparams(lambda norm: onebit_adam(1.0, b1=0.0, clip=Clip(norm)))(
        norm=schedule
    )
    params, gradients = {"w": jnp.zeros(2)}, {"w": jnp.array([3.0, 4.0])}
    state, seen = clipped.init(params), []
    update = jax.jit(clipped.update)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            _, state = update(gradients, state, params)
            seen.append(np.asarray(optax.tree.get(state, "mu")["w"]))
    np.testing.assert_allclose(seen, [[0.6, 0.8], [0.6, 0.8], [0.3, 0.4]], rtol=1e-6)
