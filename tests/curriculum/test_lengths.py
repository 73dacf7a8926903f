import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.curriculum.lengths import (
    SequenceLengthCurriculum,
    reshape,
    reshaped_rows,
    truncate,
    truncate_padded,
)
from effscale.training import (
    CustomPacing,
    DiscretePacing,
    LinearPacing,
    Loss,
    StagedStep,
    create_train_state,
    fit,
    make_train_step,
)


def packed_batch(rows, width, seed=0):
    """Rows of documents end to end, token by token as packing describes them."""
    rng = np.random.default_rng(seed)
    text = rng.integers(1, 1000, (rows, width + 1))
    document = np.cumsum(rng.random((rows, width + 1)) < 0.25, axis=1) + 1
    batch = {
        "input_ids": text[:, :-1].astype(np.int32),
        "labels": text[:, 1:].astype(np.int32),
        "loss_weights": (document[:, :-1] == document[:, 1:]).astype(np.float32),
        "segment_ids": document[:, :-1].astype(np.int32),
        "positions": positions_of(document[:, :-1]),
    }
    return batch, text


def positions_of(segments):
    positions = np.zeros(segments.shape, np.int32)
    for row in range(segments.shape[0]):
        for column in range(1, segments.shape[1]):
            if segments[row, column] == segments[row, column - 1]:
                positions[row, column] = positions[row, column - 1] + 1
    return positions


def upstream_reshape(text, d):
    """Megatron-DeepSpeed's layout of ``seqlen_reshape``, from its description, token by token."""
    c, (rows, width) = d + 1, text.shape
    pieces = []
    for row in text:
        for k in range(width // c):
            pieces.append([row[k * c + i] for i in range(c)])
    for row in text:
        pieces.append([row[width - c + i] for i in range(c)])
    numel = rows * width
    count = min(numel // c + (numel % c > 0), len(pieces))
    if count > 1 and count % 2 == 1:
        count -= 1
    return np.array(pieces[:count])


@given(rows=st.integers(1, 5), width=st.integers(2, 24), data=st.data())
def test_reshape_is_upstreams_layout(rows, width, data):
    d = data.draw(st.integers(1, width - 1))
    batch, text = packed_batch(rows, width, seed=width)
    expected = upstream_reshape(text, d)
    found = reshape(batch, d)
    np.testing.assert_array_equal(found["input_ids"], expected[:, :-1])
    np.testing.assert_array_equal(found["labels"], expected[:, 1:])
    assert len(expected) == reshaped_rows(rows, width, d)


def test_reshape_by_hand():
    # 9 tokens a row and 4 a piece: two pieces of each row, then the last four tokens of the first ones: ceil(18 / 4) = 5,
    # of which upstream drops the odd one.
    text = np.array([[10, 11, 12, 13, 14, 15, 16, 17, 18], [20, 21, 22, 23, 24, 25, 26, 27, 28]])
    batch = {"input_ids": text[:, :-1], "labels": text[:, 1:]}
    four = [[10, 11, 12], [14, 15, 16], [20, 21, 22], [24, 25, 26]]
    assert reshape(batch, 3)["input_ids"].tolist() == four
    assert reshape(batch, 3, rows_multiple_of=1)["input_ids"].tolist() == [*four, [15, 16, 17]]
    assert reshape(batch, 3, rows_multiple_of=1)["labels"][-1].tolist() == [16, 17, 18]


@given(rows=st.integers(1, 4), width=st.integers(2, 24), data=st.data())
def test_reshaped_rows_of_packed_documents_are_packed_rows(rows, width, data):
    d = data.draw(st.integers(1, width - 1))
    batch, _ = packed_batch(rows, width, seed=rows * 100 + width)
    batch["row"] = np.arange(rows)
    # A token that tells where it came from, so that what belongs to it can be looked up.
    batch["input_ids"] = np.arange(rows * width, dtype=np.int32).reshape(rows, width)
    found = reshape(batch, d, rows_multiple_of=1)
    row, column = np.divmod(found["input_ids"], width)
    assert (row == found["row"][:, None]).all()
    assert (np.diff(column, axis=1) == 1).all()
    for name in ("labels", "loss_weights", "segment_ids"):
        np.testing.assert_array_equal(found[name], batch[name][row, column])
    np.testing.assert_array_equal(found["positions"], positions_of(found["segment_ids"]))
    assert {name: x.dtype for name, x in found.items()} == {
        name: x.dtype for name, x in batch.items()
    }


@given(st.integers(1, 64), st.integers(2, 300), st.integers(1, 8), st.data())
def test_reshape_keeps_the_tokens_of_a_step_nearly_constant(rows, width, multiple, data):
    d = data.draw(st.integers(1, width))
    count = reshaped_rows(rows, width, d, multiple)
    assert count == rows or count < multiple or count % multiple == 0
    whole = rows * (width + 1)
    assert whole - multiple * (d + 1) < count * (d + 1) < whole + d + 1


def test_padding_at_the_end_of_a_row_stays_padding():
    batch = {
        "input_ids": np.array([[5, 6, 7, 0, 0, 0]]),
        "labels": np.array([[6, 7, 8, 0, 0, 0]]),  # 8 is an input nowhere
        "segment_ids": np.array([[1, 1, 1, 0, 0, 0]]),
        "positions": np.array([[0, 1, 2, 0, 0, 0]]),
    }
    found = reshape(batch, 2, rows_multiple_of=1)
    assert found["labels"].tolist() == [[6, 7], [0, 0], [0, 0]]
    assert found["positions"].tolist() == [[0, 1], [0, 0], [0, 0]]
    assert reshape(batch, 4, rows_multiple_of=1)["labels"].tolist() == [[6, 7, 8, 0], [8, 0, 0, 0]]


def test_truncate_keeps_d_inputs_and_the_label_behind_the_last():
    batch, text = packed_batch(3, 10)
    batch |= {
        "row": np.arange(3),
        "image": np.zeros((3, 10, 2)),
        "other": np.zeros((3, 5)),
        "static": None,
    }
    found = truncate(batch, 4)
    np.testing.assert_array_equal(found["input_ids"], text[:, :4])
    np.testing.assert_array_equal(found["labels"], text[:, 1:5])
    for name in ("loss_weights", "segment_ids", "positions"):
        assert found[name].shape == (3, 4)
    for name in ("row", "image", "other", "static"):
        assert found[name] is batch[name]
    assert np.shares_memory(found["input_ids"], batch["input_ids"])
    assert batch["input_ids"].shape == (3, 10)


def test_padded_rows_are_cut_at_the_longest_one_rounded_up():
    mask = np.zeros((3, 40), bool)
    for row, length in enumerate((5, 17, 9)):
        mask[row, :length] = True
    mask[1, 2] = False  # a hole is not the end
    batch = {"input_ids": np.ones((3, 40), np.int32), "attention_mask": mask}
    assert truncate_padded(batch)["input_ids"].shape == (3, 24)
    assert truncate_padded(batch, multiple_of=1)["attention_mask"].shape == (3, 17)
    assert truncate_padded(batch, multiple_of=64)["input_ids"].shape == (3, 40)
    assert truncate_padded(batch, 9)["input_ids"].shape == (3, 16)
    assert truncate_padded(batch, 40)["input_ids"].shape == (3, 40)
    empty = {**batch, "attention_mask": np.zeros((3, 40), bool)}
    assert truncate_padded(empty)["input_ids"].shape == (3, 8)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 40\)"):
        truncate_padded({"input_ids": batch["input_ids"]})


def test_all_processes_cut_at_the_longest_row_of_all(monkeypatch):
    from jax.experimental import multihost_utils

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda length: np.array([length, 30, 2], np.int32)
    )
    mask = np.arange(40)[None] < 9
    batch = {"input_ids": np.ones((1, 40)), "attention_mask": mask}
    assert truncate_padded(batch)["input_ids"].shape == (1, 32)


@pytest.mark.parametrize("cut", [truncate, reshape, truncate_padded])
@pytest.mark.parametrize("length", [0, -1, 11])
def test_lengths_that_the_rows_do_not_have(cut, length):
    batch, _ = packed_batch(2, 10)
    with pytest.raises(
        ValueError, match=f"length must be from 1 to the rows' 10 tokens, got {length}"
    ):
        cut(batch, length)
    with pytest.raises(ValueError, match=r"got image \(2, 3, 3\)"):
        cut({"image": np.zeros((2, 3, 3))}, length)
    with pytest.raises(ValueError, match=r"got input_ids \(2, 3, 3\)"):
        cut({"input_ids": np.zeros((2, 3, 3))}, length)


def linear(low, high, total=30, **options):
    return LinearPacing(
        min_difficulty=low, max_difficulty=high, total=total, difficulty_step=1, **options
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pacing": linear(0, 8)},
            "pacing must be a schedule of lengths of at least 1, .*, got LinearPacing",
        ),
        (
            {"pacing": linear(2, 12), "multiple_of": 8},
            "multiple_of must be a divisor of the full length 12.*, got 8",
        ),
        ({"pacing": linear(2, 8), "multiple_of": 0}, r"multiple_of must be .*, got 0"),
        ({"pacing": linear(2, 8), "rows_multiple_of": 0}, r"rows_multiple_of must be .*, got 0"),
        (
            {"pacing": linear(2, 8), "mode": "crop"},
            "mode must be one of 'truncate', 'reshape', got 'crop'",
        ),
    ],
)
def test_bad_curricula(fields, message, unchecked):
    with pytest.raises(ValueError, match=message):
        SequenceLengthCurriculum(**fields)


@pytest.mark.parametrize("mode", ["truncate", "reshape"])
@pytest.mark.parametrize("last", [8, 16])
def test_a_schedule_that_does_not_end_at_the_full_length(mode, last):
    curriculum = SequenceLengthCurriculum(pacing=linear(2, last), mode=mode)
    batch, _ = packed_batch(2, 10)
    for call in (lambda: curriculum.check(10), lambda: curriculum.shape_batch(batch, 4)):
        with pytest.raises(ValueError, match=f"pacing must end at the row length 10, got {last}"):
            call()


def lengths_by_hand(curriculum, batch_size, width, steps):
    """Step after step: the count is the step's number from 1, or what was consumed before it."""
    consumed, lengths = 0, []
    for step in range(steps):
        t = step + 1 if curriculum.pacing.clock == "steps" else consumed
        length = curriculum.pacing(t)
        while length % curriculum.multiple_of:
            length += 1
        lengths.append(length)
        rows = len(upstream_reshape(np.zeros((batch_size, width + 1)), length))
        reshapes = curriculum.mode == "reshape" and length < width
        tokens = (rows if reshapes else batch_size) * length
        consumed += {"steps": 0, "samples": batch_size, "tokens": tokens}[curriculum.pacing.clock]
    return lengths


@pytest.mark.parametrize("mode", ["truncate", "reshape"])
@pytest.mark.parametrize(("clock", "total"), [("steps", 30), ("samples", 70), ("tokens", 900)])
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_stages_are_the_lengths_step_by_step(mode, clock, total, multiple_of):
    curriculum = SequenceLengthCurriculum(
        pacing=linear(5, 24, total, clock=clock), mode=mode, multiple_of=multiple_of
    )
    found = curriculum.stages(batch_size=4)
    expected = lengths_by_hand(curriculum, 4, 24, 80)
    assert [found(step) for step in range(80)] == expected
    assert len(set(found.values)) == len(found.values)
    assert expected[-1] == 24


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_the_tokens_of_all_processes_are_counted_as_each_cuts_its_rows(process_count):
    curriculum = SequenceLengthCurriculum(
        pacing=linear(3, 24, 900, clock="tokens"), mode="reshape", rows_multiple_of=2
    )
    found = curriculum.stages(batch_size=8, process_count=process_count)
    parts = [packed_batch(8 // process_count, 24, seed)[0] for seed in range(process_count)]
    consumed = 0
    for step in range(40):
        assert found(step) == curriculum.pacing(consumed), step
        # What the processes give to the step together.
        cut = [curriculum.shape_batch(part, found(step))["input_ids"] for part in parts]
        consumed += sum(rows.size for rows in cut)
    assert consumed > 900


def test_a_batch_that_the_processes_cannot_share():
    curriculum = SequenceLengthCurriculum(pacing=linear(3, 24))
    for process_count in (0, 3, 16):
        with pytest.raises(
            ValueError,
            match=f"process_count must be a divisor of batch_size=8, got {process_count}",
        ):
            curriculum.stages(8, process_count=process_count)


def test_other_pacings_give_lengths_too():
    discrete = DiscretePacing(difficulty=(4, 8, 16), max_step=(2, 3))
    custom = CustomPacing(function=lambda t: 4 + t, min_difficulty=4, max_difficulty=16, total=12)
    assert SequenceLengthCurriculum(pacing=discrete).stages(1).starts == (0, 2, 3)
    assert SequenceLengthCurriculum(pacing=custom).stages(1).values[:2] == (5, 6)


def toy_loss(model, batch, key=None):
    scores = model["w"][batch["input_ids"]]
    return Loss(jnp.sum((scores - 1.0) ** 2), jnp.float32(batch["input_ids"].size))


@pytest.mark.parametrize("mode", ["truncate", "reshape"])
def test_a_run_counts_the_tokens_it_trains_on_and_compiles_once_a_length(mode):
    curriculum = SequenceLengthCurriculum(
        pacing=linear(4, 16, 6), mode=mode, multiple_of=4, rows_multiple_of=2
    )
    batch, _ = packed_batch(4, 16)
    stages = curriculum.stages(batch_size=4)
    optimizer = optax.sgd(0.1)
    state = create_train_state({"w": jnp.zeros(1000)}, optimizer, key=jax.random.key(0))
    step = StagedStep(make_train_step(toy_loss, optimizer), stages, curriculum.shape_batch)
    seen = []
    result = fit(
        state,
        step,
        iter([batch] * 9),
        num_steps=9,
        before_step=step.before_step,
        evaluate=lambda state: seen.append(batch["input_ids"].shape) or {},
    )
    rows = lambda length: 4 if mode == "truncate" else reshaped_rows(4, 16, length)
    expected = np.cumsum([rows(stages(step)) * stages(step) for step in range(9)])
    records = [record for record in result.history if "tokens" in record]
    assert [record["tokens"] for record in records] == expected.tolist()
    assert expected[-1] == stages.total(9, lambda length: rows(length) * length)
    assert step.num_compilations == len(stages.values)
    assert seen == [(4, 16)]  # evaluation sees whole rows


@pytest.mark.parametrize("mode", ["truncate", "reshape"])
def test_tokens_may_have_any_name(mode):
    pacing = LinearPacing(min_difficulty=4, max_difficulty=12, total=6, difficulty_step=4)
    ids = np.arange(48).reshape(4, 12)
    known = SequenceLengthCurriculum(pacing=pacing, mode=mode)
    own = SequenceLengthCurriculum(pacing=pacing, mode=mode, field="tokens")
    expected = known.shape_batch({"input_ids": ids, "kind": np.arange(4)}, 8)
    found = own.shape_batch({"tokens": ids, "kind": np.arange(4)}, 8)
    np.testing.assert_array_equal(found["tokens"], expected["input_ids"])
    np.testing.assert_array_equal(found["kind"], expected["kind"])
    padded = truncate_padded({"tokens": ids, "attention_mask": ids % 12 < 5}, field="tokens")
    np.testing.assert_array_equal(padded["tokens"], ids[:, :8])
    with pytest.raises(ValueError, match=r"must have input_ids.*got tokens \(4, 12\).*field="):
        known.shape_batch({"tokens": ids}, 8)
    with pytest.raises(ValueError, match="must end at the row length 11, got 12"):
        own.shape_batch({"tokens": ids[:, 1:]}, 8)
