"""0/1 Adam's two policies, against the counts of DeepSpeed's code over whole schedules."""

import jax
import numpy as np
import pytest

from effscale.optim import Policies, Round


@pytest.mark.parametrize(
    ("steps", "full", "one_bit"), [(152_000, 153, 74_168), (118_000, 153, 70_467)]
)
def test_bert_schedules(steps, full, one_bit):
    """BERT-Large's and BERT-Base's; the counts of one-bit rounds are of both stages."""
    rounds = Policies(var_freeze_step=12_500).rounds(steps)
    counts = np.bincount(rounds, minlength=4)
    assert counts[Round.VARIANCE] == full
    assert counts[Round.GRADIENT] + counts[Round.SYNC] == one_bit
    assert counts.sum() == steps


def test_volume_of_bert_large():
    """Beside 1-bit Adam with 23,000 steps of warm-up, in half precision: 84.6 % less, in 49 % of the rounds."""
    steps, bits = 152_000, {Round.VARIANCE: 16, Round.GRADIENT: 1, Round.LOCAL: 0, Round.SYNC: 1}
    rounds = Policies(var_freeze_step=12_500).rounds(steps)
    sent = sum(bits[Round(kind)] * int(number) for kind, number in enumerate(np.bincount(rounds)))
    onebit_adam = 16 * 23_000 + (steps - 23_000)
    assert round(1 - sent / onebit_adam, 3) == 0.846
    assert round(np.mean(rounds == Round.LOCAL), 3) == 0.511


def test_variance_steps():
    """Sixteen at each interval, each a multiple of it."""
    rounds = Policies().rounds(60)
    t = 1 + np.nonzero(rounds == Round.VARIANCE)[0]
    assert t.tolist() == [*range(1, 17), *range(18, 50, 2), 52, 56, 60]


def test_age_of_the_variance():
    """An update sees the steps since the last one, also where the interval has just doubled and they are fewer."""
    policies, state, ages = Policies(var_freeze_step=40, var_update_scaler=3), Policies().init(), {}
    for count in range(40):
        kind, new = policies.step(state, count)
        if int(kind) == Round.VARIANCE:
            ages[count + 1] = int(state.var_age)
        state = new
    assert list(ages) == [1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40]
    assert ages == {t: t - before for before, t in zip([0, *ages], ages, strict=False)}


def test_whole_numbers_that_are_floats():
    """As JSON has them."""
    with jax.numpy_dtype_promotion("standard"):
        floats = Policies(4.0, 1.0, 2.0, 2.0).rounds(10)
    np.testing.assert_array_equal(floats, Policies(4, 1, 2, 2).rounds(10))


def test_local_steps_double_and_are_clipped():
    rounds = Policies(var_freeze_step=0, local_step_scaler=8, local_step_clipper=3).rounds(40)
    t = 1 + np.nonzero(rounds == Round.SYNC)[0]
    assert t.tolist() == [*range(1, 9), *range(10, 17, 2), *range(18, 41, 3)]


def test_local_steps_that_have_begun_go_on_under_a_later_freeze_step():
    early, late = (Policies(step, 1, 4, 2) for step in (2, 8))
    state, kinds = early.init(), []
    for count in range(10):
        kind, state = (early if count < 3 else late).step(state, count)
        kinds.append(int(kind))
    assert kinds == early.rounds(10).tolist()


def test_no_steps():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Policies().rounds(0)
