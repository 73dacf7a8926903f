"""When the variance freezes, and the options that say so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effscale.optim import VarianceRatio, Workers, onebit_adam, onebit_lamb, zero_one_adam
from effscale.parallel import simulate_workers
from tests.optim.regression import alone_step_of, batches, run, start, step_of


def test_variance_stays_once_frozen():
    optimizer = onebit_adam(0.01, freeze_step=3, workers=Workers("data", num_workers=2))
    step = jax.jit(simulate_workers(step_of(optimizer), 2))
    params, state = start(), optimizer.init(start())
    variances, moments = [], []
    for batch in batches(6):
        params, state, _ = step(params, state, batch)
        variances.append(state.inner[0].nu)
        moments.append(state.inner[0].mu)
    for later in variances[3:]:
        jax.tree.map(np.testing.assert_array_equal, later, variances[2])
    assert all(m["kernel"].any() for m in moments), "the momentum goes on over the switch"


def test_variance_ratio_ends_the_warm_up():
    criterion = VarianceRatio(threshold=0.96, window=5, start=10)
    optimizer = onebit_adam(0.0, b2=0.8, freeze_step=1000, variance_ratio=criterion)
    params = {"w": jnp.ones(4)}
    state = optimizer.init(params)
    frozen_at = None
    update = jax.jit(optimizer.update)
    for t in range(1, 41):
        _, new = update({"w": jnp.ones(4)}, state, params)
        if frozen_at is None and bool(new.inner[0].ratio.reached):
            frozen_at = t
        if frozen_at is not None and t > frozen_at:
            np.testing.assert_array_equal(new.inner[0].nu["w"], state.inner[0].nu["w"])
        state = new
    # (1 - 0.8^(t-5)) / (1 - 0.8^t) reaches 0.96 at t = 19 for a constant gradient.
    ratios = [(1 - 0.8 ** (t - 5)) / (1 - 0.8**t) for t in range(1, 41)]
    assert frozen_at == 1 + next(i for i, r in enumerate(ratios) if i >= 10 and r >= 0.96)


def test_a_variance_of_zero_has_not_settled():
    """Gradients that are zero at first, as of a part that is trained later, do not end the warm-up."""
    optimizer = onebit_adam(0.1, variance_ratio=VarianceRatio(window=3))
    params = {"w": jnp.ones(4)}
    state = optimizer.init(params)
    for t in range(8):
        _, state = optimizer.update({"w": jnp.full(4, float(t >= 6))}, state, params)
    assert not state.inner[0].ratio.reached
    assert (state.inner[0].nu["w"] > 0).all()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("maker", [onebit_adam, zero_one_adam])
def test_a_corrected_warm_up_is_adam(maker, workers):
    """On one worker and on several, whose gradients are averaged in full then."""
    axis = {"workers": Workers("data", num_workers=workers)} if workers > 1 else {}
    adam, optimizer = optax.adam(3e-2), maker(3e-2, bias_correction=True, **axis)
    step = simulate_workers(step_of(optimizer), 2) if axis else alone_step_of(optimizer)
    found = run(jax.jit(step), optimizer)[0]
    with jax.numpy_dtype_promotion("standard"):
        expected = run(jax.jit(alone_step_of(adam)), adam)[0]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6 * workers**4)
    jax.tree.map(close, found, expected)


def test_a_later_freeze_step_begins_anew():
    """Errors of 1-bit LAMB's compressed steps before are of momenta that were scaled by numbers of then."""
    early, late = (
        onebit_lamb(0.01, freeze_step=k, workers=Workers("data", num_workers=2)) for k in (2, 5)
    )
    rows = list(batches(6))
    params, state = start(), early.init(start())
    first, step = (jax.jit(simulate_workers(step_of(o), 2)) for o in (early, late))
    for i, batch in enumerate(rows[:5]):
        params, state, _ = (first if i < 4 else step)(params, state, batch)
    inner = state.inner[0]
    zeros = jax.tree.map(jnp.zeros_like, inner.errors)
    assert any(x.any() for x in jax.tree.leaves(inner.errors))
    clean = state._replace(inner=(inner._replace(errors=zeros), *state.inner[1:]))
    found, expected = (step(params, given, rows[5])[0] for given in (state, clean))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("maker", "options", "message"),
    [
        (onebit_adam, {"b1": 1.0}, "b1 must .*got 1.0"),
        (onebit_adam, {"b2": -0.1}, "b2 must .*got -0.1"),
        (onebit_adam, {"eps": -1.0}, "eps must .*got -1.0"),
        (onebit_adam, {"freeze_step": 0}, "freeze_step must .*got 0"),
        (onebit_lamb, {"freeze_step": -3}, "freeze_step must .*got -3"),
        (onebit_lamb, {"coeff_beta": 1.0}, "coeff_beta must .*got 1.0"),
        (onebit_lamb, {"factor_min": 5.0}, "factor_min and factor_max must .*got 5.0 and "),
        (onebit_lamb, {"factor_threshold": 1.5}, "factor_threshold must .*got 1.5"),
        (onebit_lamb, {"min_coeff": 11.0}, "min_coeff and max_coeff must .*got 11.0 and "),
        (zero_one_adam, {"var_update_scaler": 0}, "var_update_scaler must .*got 0"),
        (zero_one_adam, {"local_step_clipper": 0}, "local_step_clipper must .*got 0"),
        (zero_one_adam, {"var_freeze_step": 0}, "var_freeze_step must .*got 0"),
        (onebit_adam, {"b2": np.float32(1.5)}, "b2 must .*got 1.5"),
        (onebit_adam, {"freeze_step": np.int64(0)}, "freeze_step must .*got 0"),
        (onebit_adam, {"freeze_step": 2.5}, "freeze_step must .*got 2.5"),
        (onebit_lamb, {"factor_min": 0.0}, "factor_min must .*got 0.0"),
    ],
)
def test_options_out_of_range(maker, options, message):
    with pytest.raises(ValueError, match=message):
        maker(0.1, **options)


def test_several_axes_of_workers_are_refused(unchecked):
    with pytest.raises(
        ValueError, match=r"axis_name must be the name of one .*got \('data', 'fsdp'\)"
    ):
        Workers(("data", "fsdp"))
    with pytest.raises(ValueError, match="scales must be one of tensor, tree, got 'row'"):
        Workers("data", scales="row")
