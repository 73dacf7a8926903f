import errno
import hashlib
import itertools
import json
import os
import pickle
import re
import sys
import tempfile
import tracemalloc

import grain
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from effscale.curriculum import ranking, shared_table
from effscale.curriculum.pools import growing_order
from effscale.curriculum.ranking import Ranking, rank
from effscale.curriculum.sampler import Difficulty, curriculum_rows
from effscale.data import DiskFullError, batch_rows
from effscale.training.pacing import CustomPacing, DiscretePacing, LinearPacing, RootPacing

RNG = np.random.default_rng(0)


def linear(low, high, total, clock="steps"):
    return LinearPacing(
        min_difficulty=low, max_difficulty=high, total=total, difficulty_step=1, clock=clock
    )


def ids(dataset, start, stop):
    return np.array([dataset[i] for i in range(start, stop)])


# What DeepSpeed's sampler does, from its rules and one step after another.


def upstream_clusters(metrics, steps, pacings, num_samples):
    """The clusters and the steps (from 1) at which they are made, by intervals of each metric."""
    clusters, current = [], {}
    limits = [name for name, metric in metrics.items() if metric["clustering"] == "schedule_based"]
    for t in range(1, steps + 1):
        previous = dict(current)
        current = {name: pacings[name](t) for name in metrics}
        if previous == current:
            continue
        chosen = set(range(num_samples)) if not clusters else set()
        if len(limits) == 1:
            (name,) = limits
            chosen = upstream_interval(metrics[name], previous.get(name), current[name])
        elif limits:
            chosen = set.intersection(
                *(upstream_interval(metrics[name], None, current[name]) for name in limits)
            )
        # With a single metric DeepSpeed leaves this out. Then the remainder of the percentiles is a cluster again whenever
        # another metric changes after the last percentile is reached, and its samples are drawn too often.
        chosen -= set().union(*(members for _, members in clusters))
        if chosen:
            clusters.append((t, chosen))
    return clusters


def upstream_interval(metric, previous, current):
    values, kind, greatest = metric["values"], metric["type"], metric["greatest"]
    order = sorted(range(len(values)), key=lambda sample: (values[sample], sample))
    if kind == "value":
        low = -np.inf if previous is None else previous
        return {sample for sample in order if low < values[sample] <= current}
    part = len(order) // greatest
    stop = len(order) if current == greatest else part * current
    return set(order[part * (previous or 0) : stop])


@st.composite
def curricula(draw):
    num_samples = draw(st.integers(12, 40))
    metrics, pacings = {}, {}
    for name in draw(st.sampled_from(["a", "ab", "abc"])):
        kind = draw(st.sampled_from(["value", "percentile"]))
        clustering = draw(st.sampled_from(["schedule_based", "schedule_based", "single_cluster"]))
        values = draw(st.lists(st.integers(0, 9), min_size=num_samples, max_size=num_samples))
        values[0] = 0  # so that the first pool is not empty
        values[1:] = [max(1, value) for value in values[1:]]
        greatest = draw(st.integers(9, 12)) if kind == "value" else draw(st.integers(2, 12))
        pacings[name] = {
            "min_difficulty": draw(st.integers(1, 2)),
            "max_difficulty": greatest,
            "total": draw(st.integers(1, 12)),
            "difficulty_step": 1,
            "root_degree": draw(st.integers(1, 2)),
        }
        metrics[name] = {
            "values": values, "type": kind, "greatest": greatest, "clustering": clustering
        }  # fmt: skip
    return num_samples, metrics, pacings


@hypothesis.settings(max_examples=50)
@hypothesis.given(curricula())
def test_clusters_are_those_of_deepspeed(curriculum):
    num_samples, metrics, pacings = curriculum
    difficulties = {
        name: Difficulty(
            ranking=rank(np.array(metric["values"])),
            pacing=RootPacing(**pacings[name]),
            difficulty_type=metric["type"],
            clustering_type=metric["clustering"],
        )
        for name, metric in metrics.items()
    }
    pacings = {name: difficulty.pacing for name, difficulty in difficulties.items()}
    expected = upstream_clusters(metrics, 20, pacings, num_samples)
    order = growing_order(difficulties, num_samples, 4, 0, None)
    ends = np.cumsum(order.clusters.sizes)[:-1]
    got = [set(members.tolist()) for members in np.split(order.clusters.samples, ends)]
    assert got == [members for _, members in expected]
    # DeepSpeed counts steps from 1, and a batch of 4 begins at 4 times the steps before it.
    assert order._starts.tolist() == [4 * (step - 1) for step, _ in expected]


def test_the_remainder_is_in_the_last_percentile():
    ranking = rank(np.arange(23)[::-1].copy())
    pacing = DiscretePacing(difficulty=(1, 4, 5), max_step=(2, 4))
    rows = curriculum_rows(
        range(23),
        Difficulty(ranking=ranking, pacing=pacing, difficulty_type="percentile"),
        batch_size=16,
    )
    assert set(ids(rows, 0, 32).tolist()) == set(range(19, 23))  # 23 // 5 easiest
    assert set(ids(rows, 32, 64).tolist()) <= set(range(7, 23))
    assert set(ids(rows, 0, 64 + 46).tolist()) == set(range(23))


def test_values_at_the_difficulty_are_allowed():
    difficulty = Difficulty(
        ranking=rank(np.array([0.5, 2.0, 2.0, 2.5, 3.0])),
        pacing=DiscretePacing(difficulty=(2, 3), max_step=(1,)),
    )
    rows = curriculum_rows(range(5), difficulty, batch_size=6)
    assert set(ids(rows, 0, 6).tolist()) == {0, 1, 2}
    assert set(ids(rows, 6, 18).tolist()) == set(range(5))


def test_a_short_pool_repeats_and_batches_keep_their_size():
    """DeepSpeed returns fewer samples than a batch holds."""
    difficulty = Difficulty(ranking=rank(np.arange(10)), pacing=linear(2, 9, 8))
    rows = curriculum_rows(range(10), difficulty, batch_size=8, num_steps=20)
    first = ids(rows, 0, 8)
    assert np.bincount(first).max() - np.bincount(first).min() <= 1
    assert [len(batch) for batch in batch_rows(rows, batch_size=8)] == [8] * 20


def test_the_first_visits_of_a_metric_by_percentile():
    """Square-root pacing: half of the data are open at a quarter of the way, 71 % at half of it."""
    pacing = RootPacing(min_difficulty=1, max_difficulty=100, total=100, difficulty_step=1)
    values = RNG.permutation(1000)
    difficulty = Difficulty(ranking=rank(values), pacing=pacing, difficulty_type="percentile")
    rows = curriculum_rows(range(1000), difficulty, batch_size=50)
    hardest = lambda steps: values[ids(rows, 0, 50 * steps)].max()
    assert 490 <= hardest(25) < 500
    assert 690 <= hardest(50) < 710
    visits = np.bincount(ids(rows, 0, 50 * 150), minlength=1000)[rank(values).samples]
    opens = [next(t for t in range(150) if pacing(t + 1) * 10 > place) for place in range(1000)]
    pools = np.array([10 * pacing(t + 1) for t in range(150)])
    expected = np.array([(50 / pools[open_:]).sum() for open_ in opens])
    assert np.abs(visits - expected).max() < 2
    assert visits[:10].mean() > 3 * visits[-10:].mean()


# Clocks.


def test_samples_and_tokens_are_counted_before_the_step():
    ranking = rank(np.arange(10))
    build = lambda pacing, **options: curriculum_rows(
        range(10), Difficulty(ranking=ranking, pacing=pacing), batch_size=4, **options
    )
    steps = build(DiscretePacing(difficulty=(3, 9), max_step=(5,)))
    samples = build(DiscretePacing(difficulty=(3, 9), max_step=(19,), clock="samples"))
    tokens = build(
        DiscretePacing(difficulty=(3, 9), max_step=(19 * 16,), clock="tokens"), tokens_per_row=16
    )
    for rows in (steps, samples, tokens):
        assert ids(rows, 0, 20).max() == 3
        assert ids(rows, 20, 40).max() > 3
        np.testing.assert_array_equal(ids(rows, 0, 60), ids(steps, 0, 60))


def test_tokens_need_to_be_told_how_many():
    pacing = DiscretePacing(difficulty=(3, 9), max_step=(9,), clock="tokens")
    difficulty = Difficulty(ranking=rank(np.arange(10)), pacing=pacing)
    with pytest.raises(
        ValueError, match="pacing of 'length' counts tokens, so it needs tokens_per_row"
    ):
        curriculum_rows(range(10), {"length": difficulty}, batch_size=4)


# Composition with grain.


def difficulties():
    return {
        "rarity": Difficulty(
            ranking=rank(np.random.default_rng(1).permutation(60)),
            pacing=linear(2, 10, 12),
            difficulty_type="percentile",
        ),
        "length": Difficulty(
            ranking=rank(np.random.default_rng(2).integers(1, 20, 60)), pacing=linear(5, 20, 9)
        ),
    }


def batches(count, process=0, processes=1, threads=2, prefetch=8, seed=0):
    rows = curriculum_rows(SOURCE, difficulties(), batch_size=8, seed=seed, num_steps=60)
    dataset = batch_rows(
        rows, batch_size=8, process_index=process, process_count=processes,
        num_threads=threads, prefetch=prefetch,
    )  # fmt: skip
    return list(itertools.islice(iter(dataset), count))


SOURCE = [{"id": np.int32(i), "square": np.full(3, i * i)} for i in range(60)]


def test_length_is_that_of_the_run_or_without_end():
    options = {"difficulties": difficulties(), "batch_size": 8}
    assert len(curriculum_rows(range(60), num_steps=7, **options)) == 56
    endless = curriculum_rows(range(60), **options)
    assert len(endless) == len(grain.MapDataset.range(3).repeat()) == sys.maxsize
    batch = next(iter(batch_rows(endless, batch_size=8)))
    np.testing.assert_array_equal(batch, ids(endless, 0, 8))
    assert len(batches(100)) == 60


def test_rows_are_an_ordinary_grain_dataset():
    parent = grain.MapDataset.source(SOURCE).map(lambda row: row["id"])
    rows = curriculum_rows(parent, difficulties(), batch_size=8)
    expected = [row["id"] for row in SOURCE]
    np.testing.assert_array_equal(
        ids(rows.map(lambda x: x + 1), 0, 200),
        ids(curriculum_rows(expected, difficulties(), batch_size=8), 0, 200) + 1,
    )
    np.testing.assert_array_equal(rows.batch(4)[3], ids(rows, 12, 16))
    np.testing.assert_array_equal(ids(rows.slice(slice(8, 80)), 0, 72), ids(rows, 8, 80))
    # A batch of 8 of the mixture takes 4 from the curriculum.
    half = curriculum_rows(parent, difficulties(), batch_size=4)
    other = grain.MapDataset.source(np.arange(1000, 1100)).repeat()
    mixed = ids(grain.MapDataset.mix([half, other], weights=[1, 1]), 0, 400)
    assert sorted(mixed[mixed < 1000].tolist()) == sorted(ids(half, 0, 200).tolist())


def test_packing_takes_the_rows_in_order():
    texts = [{"ids": np.full(1 + i % 7, i)} for i in range(60)]
    rows = curriculum_rows(texts, difficulties(), batch_size=8, num_steps=10)
    packed = grain.experimental.ConcatThenSplitIterDataset(
        rows.to_iter_dataset(), length_struct={"ids": 16}
    )
    got = np.concatenate([row["ids"] for row in itertools.islice(iter(packed), 8)])
    whole = np.concatenate([rows[i]["ids"] for i in range(len(rows))])
    np.testing.assert_array_equal(got, whole[: len(got)])


def test_a_source_can_be_pickled_for_worker_processes():
    rows = curriculum_rows(range(60), difficulties(), batch_size=8, num_steps=5)
    rows[0]
    np.testing.assert_array_equal(
        ids(pickle.loads(pickle.dumps(rows._source)), 0, 40), ids(rows, 0, 40)
    )


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(processes):
    single = batches(60)
    parts = [batches(60, process, processes, threads=1) for process in range(processes)]
    for whole, *split in zip(single, *parts, strict=True):
        for key in whole:
            np.testing.assert_array_equal(whole[key], np.concatenate([part[key] for part in split]))


def test_the_seed_decides():
    same = [np.concatenate([batch["id"] for batch in batches(40, seed=seed)]) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(same[0], same[1])
    assert (same[0] != same[2]).mean() > 0.5


# Resuming. DeepSpeed's state is a random generator that is not the one it draws from, and files of clusters that are
# rewritten as training goes on, so what follows a resume is neither what would have followed nor repeatable.


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (2, 8), (4, 50)])
def test_resume_goes_on_exactly(threads, prefetch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = curriculum_rows(SOURCE, difficulties(), batch_size=8, num_steps=60)
    dataset = lambda process=0, processes=1: batch_rows(
        rows, batch_size=8, process_index=process, process_count=processes,
        num_threads=threads, prefetch=prefetch,
    )  # fmt: skip
    whole = [batch["id"] for batch in dataset()]
    iterator, states = iter(dataset()), []
    for _ in range(60):
        states.append(json.dumps(iterator.get_state()))
        next(iterator)
    # In the middle of clusters and passes, in any order: older ones after the run has gone on, too.
    for step in (31, 0, 7, 2, 59, 12, 3):
        resumed = iter(dataset())
        resumed.set_state(json.loads(states[step]))
        for expected in whole[step : step + 9]:
            np.testing.assert_array_equal(next(resumed)["id"], expected)
        part = iter(dataset(1, 2))
        part.set_state(json.loads(states[step]))
        np.testing.assert_array_equal(next(part)["id"], whole[step][4:])
    # It goes on: no part of the run is replayed.
    resumed = iter(dataset())
    resumed.set_state(json.loads(states[20]))
    assert not np.array_equal(next(resumed)["id"], whole[0])
    assert json.loads(states[20]) == {"next_index": 20}
    assert not list(tmp_path.iterdir())


def test_a_state_exists_without_a_restriction_too():
    """DeepSpeed cannot save the state of a sampler whose curriculum is off."""
    free = Difficulty(pacing=linear(8, 64, 10), clustering_type="single_cluster")
    rows = curriculum_rows(SOURCE, {"length": free}, batch_size=10)
    iterator = iter(batch_rows(rows, batch_size=10))
    first = np.concatenate([next(iterator)["id"] for _ in range(6)])
    assert sorted(first.tolist()) == list(range(60))
    assert iterator.get_state() == {"next_index": 6}


def test_grain_agrees_that_it_is_checkpointable():
    rows = curriculum_rows(SOURCE, difficulties(), batch_size=8, num_steps=6)
    grain.experimental.assert_equal_output_after_checkpoint(batch_rows(rows, batch_size=8))


def test_step_a_million_is_reached_at_once():
    """The same numbers as a run whose curriculum ended long ago, by the law that rounds have no gaps."""
    rows = curriculum_rows(range(60), difficulties(), batch_size=8)
    start = 8 * 10**6
    far = ids(rows, start, start + 240)
    assert np.bincount(far, minlength=60).max() <= 6
    assert np.bincount(far, minlength=60).min() >= 2
    np.testing.assert_array_equal(ids(rows, start + 100, start + 140), far[100:140])


# The table of the samples.


def test_the_order_does_not_change_with_versions_or_blocks(monkeypatch):
    """Runs are resumed with later versions."""
    rng = np.random.default_rng(5000)
    both = {
        "rarity": Difficulty(
            ranking=rank(rng.random(5000)),
            pacing=RootPacing(min_difficulty=10, max_difficulty=50, total=200, difficulty_step=1),
            difficulty_type="percentile",
        ),
        "length": Difficulty(
            ranking=rank(rng.integers(1, 2049, 5000)),
            pacing=LinearPacing(
                min_difficulty=900, max_difficulty=2000, total=200, difficulty_step=64
            ),
        ),
    }
    places = [start + i for start in (0, 1600, 6368, 32 * 10**6) for i in range(640)]
    for block in (97, 1 << 20):
        monkeypatch.setattr(ranking, "BLOCK", block)
        with pytest.warns(UserWarning, match="never drawn"):
            rows = curriculum_rows(range(5000), both, batch_size=32, seed=5)
        drawn = np.array([rows[i] for i in places], "<i8")
        assert hashlib.blake2b(drawn, digest_size=8).hexdigest() == "3a02705fbb5644eb"


@pytest.fixture
def large(monkeypatch, tmp_path):
    """A curriculum of so many samples that its table is a file, whose folder is the other value."""
    monkeypatch.setattr(shared_table, "MAX_PICKLED_BYTES", 10_000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ranking, "BLOCK", 1 << 12)
    difficulty = Difficulty(
        ranking=rank(np.random.default_rng(0).random(100_000)),
        pacing=linear(1, 20, 40),
        difficulty_type="percentile",
    )
    return lambda: curriculum_rows(range(100_000), difficulty, batch_size=32), tmp_path


def test_processes_share_a_large_table(large, monkeypatch):
    build, folder = large
    rows = build()
    (file,) = folder.iterdir()
    assert file.stat().st_size == 4 * 100_000
    pickled = pickle.dumps(rows._source)
    assert len(pickled) < 10_000
    np.testing.assert_array_equal(ids(pickle.loads(pickled), 0, 500), ids(rows, 0, 500))
    monkeypatch.setattr(shared_table, "MAX_PICKLED_BYTES", 1 << 20)
    np.testing.assert_array_equal(ids(build(), 0, 500), ids(rows, 0, 500))
    del rows
    assert not list(folder.iterdir())
    with pytest.raises(FileNotFoundError, match="Call curriculum_rows in this process"):
        pickle.loads(pickled)


def test_setting_up_takes_about_a_byte_per_sample(large):
    build, _ = large
    tracemalloc.start()
    try:
        build()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 100_000


def test_a_disk_without_room_for_the_table_is_said(large, monkeypatch):
    build, folder = large

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DiskFullError, match=r"0\.0 GB.*Set TMPDIR"):
        build()
    assert not list(folder.iterdir())


# Bad input.


def test_fewer_samples_than_percentiles():
    """DeepSpeed draws from an empty cluster and fails."""
    with pytest.raises(
        ValueError, match="at least 10 samples for the 10 percentiles of the pacing, got 5"
    ):
        Difficulty(
            ranking=rank(np.arange(5)), pacing=linear(1, 10, 5), difficulty_type="percentile"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pacing": linear(1, 9, 50)}, r"'rarity' starts at 1, and the smallest value is 3"),
        (
            {"pacing": linear(0, 5, 10), "difficulty_type": "percentile"},
            r"'rarity' starts at 0, and the smallest percentile is 1",
        ),
    ],
)
def test_an_empty_first_pool(options, message):
    difficulty = Difficulty(ranking=rank(np.array([3, 4, 5, 6, 7])), **options)
    with pytest.raises(ValueError, match=message):
        curriculum_rows(range(5), {"rarity": difficulty}, batch_size=2)


def test_an_empty_first_intersection():
    up, down = np.arange(10), np.arange(10)[::-1].copy()
    both = {
        name: Difficulty(ranking=rank(values), pacing=linear(3, 9, 4))
        for name, values in {"a": up, "b": down}.items()
    }
    with pytest.raises(ValueError, match="no sample is allowed by all of 'a', 'b'"):
        curriculum_rows(range(10), both, batch_size=2)


def test_samples_that_are_too_hard_are_said_to_be_left_out():
    difficulty = Difficulty(ranking=rank(np.arange(10)), pacing=linear(2, 6, 4))
    with pytest.warns(UserWarning, match=r"3 of 10 samples are never drawn.*\(length 6\)"):
        rows = curriculum_rows(range(10), {"length": difficulty}, batch_size=2)
    assert set(ids(rows, 0, 200).tolist()) == set(range(7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"tokens_per_row": 0}, "tokens_per_row must be at least 1, got 0"),
        ({"seed": -1}, "got -1"),
        ({"difficulties": {}}, "at least one entry, got {}"),
        (
            {"rows": range(61)},
            "ranking of 'rarity' must have one sample for each of the 61 rows, got 60",
        ),
        ({"rows": []}, "finite length of at least 1, got 0"),
        ({"rows": grain.MapDataset.range(60).repeat()}, "Do not call repeat"),
    ],
)
def test_bad_arguments(change, message):
    options = {"rows": range(60), "difficulties": difficulties(), "batch_size": 8, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        curriculum_rows(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranking": None}, "Difficulty.ranking must be a ranking of the samples"),
        ({"ranking": Ranking(np.array([0, 0]), np.array([1, 2]))}, "must be each of 0 to 1 once"),
    ],
)
def test_bad_difficulties(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Difficulty(**{"ranking": rank(np.arange(4)), "pacing": linear(1, 3, 5), **change})


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("difficulty_type", "percent", "did you mean 'percentile'"),
        ("clustering_type", "schedule", "did you mean 'schedule_based'"),
    ],
)
def test_misspelled_types(field, value, hint):
    """What a user meets, for whom no type checker stands before the config's own checks."""
    difficulty = Difficulty(ranking=rank(np.arange(4)), pacing=linear(1, 3, 5))
    object.__setattr__(difficulty, field, value)
    with pytest.raises(ValueError, match=hint):
        difficulty.__post_init__()


def test_rows_outside_are_refused():
    rows = curriculum_rows(range(60), difficulties(), batch_size=8, num_steps=2)
    for index in (-1, 16):
        with pytest.raises(IndexError, match=f"row must be from 0 to 15, got {index}"):
            rows._source[index]


def test_a_custom_pacing_and_many_pools():
    """As many pools as samples."""
    pacing = CustomPacing(function=lambda t: t, min_difficulty=0, max_difficulty=299, total=299)
    rows = curriculum_rows(
        range(300), Difficulty(ranking=rank(np.arange(300)), pacing=pacing), batch_size=3
    )
    drawn = ids(rows, 0, 900).reshape(300, 3)
    assert (drawn.max(1) <= np.arange(1, 301)).all()
    assert len(np.unique(ids(rows, 0, 900 + 300))) == 300
