"""Who gets which record: DeepSpeed-Chat's own numbers, and laws."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.data import Splits
from effscale.rlhf.data import Blend, Record, phase_split, split_by_prompt


def test_deepspeed_chat_s_numbers():
    expected = [[10, 0, 12], [9, 2, 11, 7, 1], [8, 4, 5, 6, 3]]
    for shares in ("2,4,4", (2, 4, 4), [0.2, 0.4, 0.4]):
        assert [part.tolist() for part in phase_split(13, shares, seed=1234)] == expected
    # What rounding leaves over goes to the first phase.
    assert [len(part) for part in phase_split(1, "2,4,4")] == [1, 0, 0]


@given(st.integers(0, 60), st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any))
def test_phases_have_all_records_and_none_in_common(count, shares):
    parts = phase_split(count, shares)
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - count * share / sum(shares)) <= len(shares)


def test_an_edge_that_the_original_makes_negative():
    # Shares 0, 5, 5 of 3 records: edges 0, 2, 4 are one too many, and the original's first phase gets all records but one.
    assert [len(part) for part in phase_split(3, "0,5,5")] == [0, 1, 2]


@pytest.mark.parametrize("shares", ["", "2;4", (0, 0), (-1, 2), (float("nan"), 1), ()])
def test_shares_that_are_none(shares):
    with pytest.raises(ValueError, match="shares must be numbers"):
        phase_split(5, shares)


def test_other_arguments_of_a_split():
    with pytest.raises(ValueError, match=r"seed.*-3"):
        phase_split(5, seed=-3)
    with pytest.raises(ValueError, match="below 2"):
        phase_split(5, seed=2**32)
    with pytest.raises(ValueError, match="count must be 0 or more, got -1"):
        phase_split(-1)
    assert not np.array_equal(phase_split(50, seed=1)[1], phase_split(50, seed=2)[1])


def test_a_prompt_is_in_one_part_only():
    records = [Record(prompt=f"Q{i % 40}", chosen=str(i)) for i in range(120)]
    parts = split_by_prompt(records, Splits(fractions={"train": 0.7, "held_out": 0.3}))
    prompts = [{record.prompt for record in part} for part in parts.values()]
    assert sum(map(len, parts.values())) == 120
    assert all(prompts)
    assert not prompts[0] & prompts[1]


def test_a_blend_without_weights_is_a_permutation_of_all():
    blend = Blend(sizes=(5, 3), seed=7)
    epochs = [blend.epoch(number) for number in range(3)]
    everything = sorted((s, i) for s, n in enumerate((5, 3)) for i in range(n))
    for epoch in epochs:
        assert sorted(map(tuple, epoch.tolist())) == everything
    assert len({epoch.tobytes() for epoch in epochs}) == 3
    assert np.array_equal(Blend(sizes=(5, 3), seed=7).epoch(1), epochs[1])
    assert not np.array_equal(Blend(sizes=(5, 3), seed=8).epoch(1), epochs[1])


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.05, 1)), min_size=1, max_size=3),
    st.integers(0, 5),
)
def test_a_blend_keeps_its_weights_and_repeats_nothing(sources, number):
    sizes, weights = zip(*sources, strict=True)
    blend = Blend(sizes=sizes, weights=weights)
    rows = list(map(tuple, blend.epoch(number).tolist()))
    assert len(rows) == len(set(rows)) == len(blend)
    counts = collections.Counter(source for source, _ in rows)
    assert tuple(counts[i] for i in range(len(sizes))) == blend.counts
    scale = min(size / weight for size, weight in sources)
    for source, (size, weight) in enumerate(sources):
        assert all(0 <= index < size for s, index in rows if s == source)
        assert abs(counts[source] - scale * weight) <= 1


def test_epochs_of_a_blend_go_through_a_large_source_before_they_repeat():
    blend = Blend(sizes=(12, 3), weights=(0.5, 0.5))
    assert blend.counts == (3, 3)
    taken = [i for number in range(4) for s, i in blend.epoch(number).tolist() if s == 0]
    assert sorted(taken) == list(range(12))
    again = [i for s, i in blend.epoch(4).tolist() if s == 0]
    assert again != taken[:3]


def test_a_source_that_runs_out_is_used_to_its_end():
    assert Blend(sizes=(3, 49), weights=(0.3, 0.7)).counts == (3, 7)
    assert Blend(sizes=(49, 1000), weights=(0.1, 0.9)).counts == (49, 441)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sizes": (0, 3)}, r"sizes\[0\] must be at least 1"),
        ({"sizes": ()}, "sizes must be a tuple whose length is at least 1"),
        (
            {"sizes": (3, 3), "weights": (1.0,)},
            "weights must be one entry for each of the 2 sources, got",
        ),
        ({"sizes": (3, 3), "weights": (1.0, 0.0)}, r"weights\[1\] must be above 0, got 0"),
        (
            {"sizes": (3,), "weights": (float("inf"),)},
            r"weights\[0\] must be a finite number, got inf",
        ),
        ({"sizes": (3,), "seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_blends_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        Blend(**given)


def test_epochs_count_from_0():
    with pytest.raises(ValueError, match="number must be 0 or more, got -1"):
        Blend(sizes=(3,)).epoch(-1)
