"""Batches that grow: sizes as Megatron-DeepSpeed computes them, and every row once whatever the processes."""

import grain
import numpy as np
import pytest

from effscale.data import batch_rows
from effscale.training import batch_ramp, resize_rows


def megatron(start, increment, samples, final, steps):
    """The batch size of each step by the rule of ``--rampup-batch-size``, applied step by step."""
    per_increment = samples / ((final - start) // increment)
    consumed, sizes = 0, []
    for _ in range(steps):
        size = final if consumed > samples else start + increment * int(consumed // per_increment)
        sizes.append(size)
        consumed += size
    return sizes


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ((192, 16, 9_765_625, 2048), 13_000),  # BLOOM-176B
        ((192, 32, 9_765_625, 256), 50_000),  # BLOOM-560M
        ((8, 4, 2000, 16), 300),
        ((4, 4, 40, 64), 20),  # batches longer than a stage
    ],
)
def test_sizes_are_those_of_the_original(arguments, steps):
    ramp = batch_ramp(*arguments)
    assert [ramp(step) for step in range(steps)] == megatron(*arguments, steps)


def test_no_ramp():
    assert batch_ramp(8, 4, 0, 16).values == batch_ramp(16, 4, 100, 16).values == (16,)


@pytest.mark.parametrize("arguments", [(8, 5, 10, 16), (32, 8, 10, 16), (0, 4, 10, 16)])
def test_what_leads_nowhere_is_refused(arguments):
    with pytest.raises(ValueError, match=r"increment|sizes"):
        batch_ramp(*arguments)


def rows(count):
    return grain.MapDataset.range(count).map(lambda i: {"input_ids": np.full(3, i)})


def batches(count, sizes, processes):
    """The batches of a number of processes, each put together from its parts."""
    parts = [
        list(batch_rows(rows(count), batch_size=sizes, process_index=i, process_count=processes))
        for i in range(processes)
    ]
    return [
        np.concatenate([b["input_ids"][:, 0] for b in each]) for each in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("processes", [1, 4])
def test_rows_are_dealt_out_in_order_without_a_gap(processes):
    found = batches(100, batch_ramp(4, 4, 20, 12), processes)
    assert [len(batch) for batch in found] == [4, 4, 4, 8, 12, 12, 12, 12, 12, 12]
    assert np.concatenate(found).tolist() == list(range(92))


def test_the_position_is_kept_over_another_number_of_processes():
    sizes = batch_ramp(4, 4, 20, 12)
    whole = batches(100, sizes, 1)
    iterator = iter(batch_rows(rows(100), batch_size=sizes, process_index=0, process_count=4))
    for _ in range(5):
        next(iterator)
    other = iter(batch_rows(rows(100), batch_size=sizes, process_index=1, process_count=2))
    other.set_state(iterator.get_state())
    assert next(other)["input_ids"][:, 0].tolist() == whole[5][6:].tolist()


def test_a_size_that_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="batch_size must be a multiple of process_count=4, got 6"):
        batch_rows(rows(100), batch_size=batch_ramp(4, 2, 20, 12), process_count=4)


def test_shapes_to_come():
    batch = {"input_ids": np.zeros((4, 3))}
    assert resize_rows(batch, 4)["input_ids"] is batch["input_ids"]
    assert resize_rows(batch, 8)["input_ids"].shape == (8, 3)
