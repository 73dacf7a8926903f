import json
import math

import grain
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.curriculum.loss_driven import LossDrivenBatches
from effscale.curriculum.ranking import rank

VALUES = np.random.default_rng(0).permutation(47)
RANKING = rank(VALUES)


def build(rows=range(47), **options):
    options = {"batch_size": 6, "target_loss": 1.0, "max_difficulty": 9, "window": 4, **options}
    return LossDrivenBatches(rows, RANKING, **options)


def losses(count, seed=0):
    """Falling, with noise, and with values that are no numbers."""
    noise = np.random.default_rng(seed).normal(size=count) * 0.3
    values = 4 * np.exp(-np.arange(count) / 25) + 0.5 + noise
    values[5::17] = np.nan
    return values.tolist()


def train(iterator, reports):
    drawn, difficulties = [], []
    for loss in reports:
        drawn.append(next(iterator).tolist())
        difficulties.append(iterator.difficulty)
        iterator.report(loss)
    return drawn, difficulties


def slow_difficulties(reports, target, first, last, window):
    """From the definition; a batch knows the losses of all batches but the one before it."""
    result, highest = [], first
    for step in range(len(reports)):
        known = [loss for loss in reports[: max(0, step - 1)] if not math.isnan(loss)]
        if known:
            means = [sum(known[:1])]
            for t, loss in enumerate(known[1:], 2):
                share = 1 / min(t, window)
                means.append((1 - share) * means[-1] + share * loss)
                now = (known[0] - means[-1]) / (known[0] - target)
                now = first + math.floor(min(1.0, max(0.0, now)) * (last - first))
                highest = max(highest, now)
        result.append(highest)
    return result


@pytest.mark.parametrize("first", [1, 3])
def test_the_pool_grows_as_the_running_mean_falls(first):
    reports = losses(150)
    drawn, difficulties = train(iter(build(min_difficulty=first)), reports)
    assert difficulties == slow_difficulties(reports, 1.0, first, 9, 4)
    assert difficulties[0] == first
    assert difficulties[-1] == 9
    part = 47 // 9
    place = np.empty(47, int)
    place[RANKING.samples] = np.arange(47)
    for batch, difficulty in zip(drawn, difficulties, strict=True):
        assert place[batch].max() < (47 if difficulty == 9 else part * difficulty)
    assert set(np.ravel(drawn)) == set(range(47))


def test_the_pool_never_shrinks():
    reports = [5.0, 2.0, 2.0, 9.0, 9.0, 9.0, 9.0, 9.0]
    _, difficulties = train(iter(build()), reports)
    assert max(difficulties) > 3
    assert difficulties == sorted(difficulties)


def test_passes_are_without_replacement():
    """While the pool stays, its first cluster comes whole before any of it comes again."""
    drawn, _ = train(iter(build(min_difficulty=4)), [3.0] * 20)
    stream = np.ravel(drawn)
    size = 4 * (47 // 9)
    for begin in range(0, len(stream) - size, size):
        assert len(set(stream[begin : begin + size])) == size


def test_the_loss_just_reported_is_not_waited_for():
    class Busy:
        def __float__(self):
            raise AssertionError("read too early")

    iterator = iter(build())
    next(iterator)
    iterator.report(Busy())
    next(iterator)
    with pytest.raises(AssertionError, match="too early"):
        next(iterator)


def test_resume_is_exact_at_every_step():
    reports = losses(80)
    iterator, states = iter(build()), []
    for loss in reports:
        states.append(json.dumps(iterator.get_state(), allow_nan=False))
        next(iterator)
        iterator.report(jnp.float32(loss) if not math.isnan(loss) else loss)
    # Losses in float32, as a step gives them; the uninterrupted run must see the same.
    rounded = [float(np.float32(loss)) for loss in reports]
    whole, _ = train(iter(build()), rounded)
    for step in (0, 1, 2, 30, 6, 71):
        resumed = iter(build())
        resumed.set_state(json.loads(states[step]))
        assert train(resumed, rounded[step:])[0] == whole[step:]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_agree_without_talking(count):
    reports = losses(60)
    whole, _ = train(iter(build()), reports)
    iterators = [iter(build(process_index=i, process_count=count)) for i in range(count)]
    parts = [train(iterator, reports)[0] for iterator in iterators]
    assert np.concatenate(parts, axis=1).tolist() == whole
    states = [json.dumps(iterator.get_state()) for iterator in iterators]
    assert len(set(states)) == 1
    # And another number of processes goes on.
    alone = iter(build())
    alone.set_state(json.loads(states[0]))
    expected = next(alone)
    np.testing.assert_array_equal(np.concatenate([next(one) for one in iterators]), expected)


def test_rows_are_stacked_as_pytrees():
    rows = grain.MapDataset.range(47).map(lambda i: {"id": np.int32(i), "pair": np.full(2, i)})
    batch = next(iter(build(rows)))
    assert batch["id"].dtype == np.int32
    assert batch["pair"].shape == (6, 2)
    np.testing.assert_array_equal(batch["pair"][:, 0], batch["id"])


def test_a_model_that_is_good_enough_from_the_start_sees_everything():
    _, difficulties = train(iter(build()), [0.5] * 4)
    assert difficulties == [1, 1, 9, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": range(48)}, "one sample for each of the 48 rows, got 47"),
        ({"target_loss": float("nan")}, "target_loss must be finite, got nan"),
        ({"min_difficulty": 0}, "min_difficulty and .*got 0 and "),
        (
            {"min_difficulty": 10},
            "min_difficulty and max_difficulty must be increasing.*got 10 and 9",
        ),
        ({"max_difficulty": 48}, "at most the number of samples 47.*and 48"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"seed": -1}, "seed must be.*got -1"),
        ({"process_index": 1}, "process_index must be .*got 1"),
        ({"process_count": 4}, "batch_size must be a multiple of process_count=4, got 6"),
        ({"batch_size": 0}, "batch_size must be .*got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_state_of_more_percentiles_is_refused():
    iterator = iter(build())
    train(iterator, [5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"at most 2 pools"):
        iter(build(max_difficulty=2)).set_state(iterator.get_state())
