"""Arrays of records: what is learned of each, what is padding, and what is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from effscale.data import train_tokenizer
from effscale.models import Transformer, gpt2
from effscale.rlhf import preference_loss
from effscale.rlhf.data import (
    Record,
    RecordEncoder,
    RecordReport,
    fine_tuning_rows,
    pair_rows,
    prompt_rows,
    row_batches,
)
from effscale.rlhf.data.rows.padding import pad_rows
from effscale.rlhf.preferences import diverging
from effscale.training import next_token_loss

# One id a character: 0 is the end, and padding as well.
ENCODER = RecordEncoder(tokenizer=train_tokenizer(["x"], vocab_size=257))
OTHER_PAD = RecordEncoder(tokenizer=ENCODER.tokenizer, pad_token_id=7)
IDS = lambda text: ENCODER.tokenizer.encode(text).ids
words = st.text("abc", min_size=1, max_size=9)


def pairs(*texts):
    return [Record(prompt=p, chosen=c, rejected=r) for p, c, r in texts]


def test_deepspeed_chat_s_padding():
    tokens, mask = pad_rows([[5, 6, 7], [8, 9]], 6, pad_token_id=0, side="left")
    assert tokens.tolist() == [[0, 0, 0, 5, 6, 7], [0, 0, 0, 0, 8, 9]]
    assert mask.sum(1).tolist() == [3, 2]
    tokens, mask = pad_rows([[5, 0, 7], []], 4, pad_token_id=0, side="right")
    assert tokens.tolist() == [[5, 0, 7, 0], [0, 0, 0, 0]]
    assert mask.tolist() == [[True, True, True, False], [False] * 4]  # not by the token's number
    with pytest.raises(ValueError, match="length must be at least the 3 tokens of row 0, got 2"):
        pad_rows([[1, 2, 3]], 2, pad_token_id=0, side="left")


def test_every_record_may_count_alike():
    """BLOOMZ's loss: the mean over records of the mean over each one's tokens."""
    records = [Record(prompt="ab", chosen="c"), Record(prompt="a", chosen="bcabcab")]
    config = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=257, max_length=16)
    model = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()

    def loss(records, **options):
        rows = fine_tuning_rows(records, ENCODER, length=16, **options)
        found = next_token_loss(model, jax.tree.map(jnp.asarray, rows))
        return float(found.total / found.weight)

    alone = [loss([record]) for record in records]
    np.testing.assert_allclose(loss(records, weigh="record"), np.mean(alone), rtol=1e-5)
    assert abs(loss(records) - np.mean(alone)) > 1e-3  # two tokens against eight
    rows = fine_tuning_rows(records, ENCODER, length=16, weigh="record")
    assert rows["segment_ids"].max() == 2  # in one row
    np.testing.assert_allclose(rows["loss_weights"].sum(), 2, rtol=1e-6)


@pytest.mark.parametrize("encoder", [ENCODER, OTHER_PAD], ids=["pad is end", "own pad"])
def test_what_is_learned_of_a_record(encoder):
    record = [Record(prompt="ab", chosen="cd")]
    rows = fine_tuning_rows(record, encoder, length=6)
    a, b, c, d = IDS("abcd")
    pad = encoder.pad_token_id
    assert rows["input_ids"].tolist() == [[a, b, c, d, pad, pad]]
    assert rows["labels"].tolist() == [[b, c, d, 0, pad, pad]]
    assert rows["loss_weights"].tolist() == [[0, 1, 1, 1, 0, 0]]  # its end is learned
    assert rows["segment_ids"].tolist() == [[1, 1, 1, 1, 0, 0]]
    assert rows["positions"].tolist() == [[0, 1, 2, 3, 0, 0]]
    whole = fine_tuning_rows(record, encoder, length=6, loss_on="all")
    assert whole["loss_weights"].tolist() == [[1, 1, 1, 1, 0, 0]]
    assert {key: rows[key].dtype for key in rows} == {
        key: np.float32 if key == "loss_weights" else np.int32 for key in rows
    }


@given(st.lists(st.tuples(words, words), min_size=1, max_size=12), st.booleans(), st.booleans())
def test_packing_loses_and_divides_nothing(texts, pack, everything):
    records = [Record(prompt=p, chosen=c) for p, c in texts]
    rows = fine_tuning_rows(
        records, OTHER_PAD, length=20, pack=pack, loss_on="all" if everything else "response"
    )
    found = []
    for i in range(len(rows["labels"])):
        segments = rows["segment_ids"][i]
        assert (np.diff(segments[segments > 0]) >= 0).all()  # each in one piece
        assert not rows["loss_weights"][i][segments == 0].any()
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            inputs, labels, weights = (rows[k][i][here] for k in ("input_ids", "labels", "loss_weights"))  # fmt: skip
            assert rows["positions"][i][here].tolist() == list(range(here.sum()))
            assert inputs[1:].tolist() == labels[:-1].tolist()
            found.append(([inputs[0], *labels], weights.tolist()))
    expected = []
    for p, c in texts:
        ids = [*IDS(p), *IDS(c), 0]
        learned = len(ids) - 1 if everything else len(c) + 1
        expected.append((ids, [0.0] * (len(ids) - 1 - learned) + [1.0] * learned))
    assert sorted(found) == sorted(expected)
    if not pack:
        assert found == expected  # in the order of the records


def test_packing_leaves_little_room():
    rng = np.random.default_rng(0)
    records = [Record(prompt="a" * n, chosen="b") for n in rng.integers(1, 30, 400)]
    rows = fine_tuning_rows(records, ENCODER, length=64)
    assert (rows["segment_ids"] > 0).mean() > 0.98


def test_a_packed_record_has_the_loss_that_it_has_alone():
    tiny = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=257, max_length=16)
    model = Transformer(tiny, rngs=nnx.Rngs(0))
    records = pairs(("ab", "cd", "x"), ("b", "a", "x"), ("cc", "b", "x"))
    compiled = jax.jit(next_token_loss)
    loss = lambda rows: compiled(model, {k: jnp.asarray(v) for k, v in rows.items()})
    packed = loss(fine_tuning_rows(records, ENCODER, length=16))
    alone = [loss(fine_tuning_rows([record], ENCODER, length=16)) for record in records]
    np.testing.assert_allclose(packed.total, sum(one.total for one in alone), rtol=1e-5)
    assert float(packed.weight) == 3 + 2 + 2


def test_long_records_are_dropped_or_cut(caplog):
    records = pairs(("ab", "c" * 9, "x"), ("a", "b", "x"), ("a" * 9, "c", "x"))
    report = RecordReport()
    rows = fine_tuning_rows(records, ENCODER, length=5, report=report)
    assert rows["labels"].shape == (1, 5)
    assert report.counts == {"too_long": 2}
    assert "of 3 records: 2 records left out (2 too_long), e.g. record 0: 12 tokens" in caplog.text
    rows = fine_tuning_rows(records, ENCODER, length=5, too_long="cut", pack=False)
    c = IDS("c")[0]
    assert rows["labels"][0].tolist() == [*IDS("b"), c, c, c, c]  # its end is not learned
    assert len(rows["labels"]) == 2  # of the last one no response would be left
    with pytest.raises(ValueError, match="no row is left of 1 records: 1 record left out"):
        fine_tuning_rows(records[2:], ENCODER, length=5, too_long="cut")


@pytest.mark.parametrize("encoder", [ENCODER, OTHER_PAD], ids=["pad is end", "own pad"])
def test_pairs(encoder):
    records = pairs(("a", "bc", "b"), ("a" * 5, "b", "c"), ("a", "b", "cc"))
    rows = pair_rows(records, encoder, lengths=(8, 4, 100))
    assert list(rows) == [4, 8]
    short, long = rows.values()
    a, b, c = IDS("abc")
    pad = encoder.pad_token_id
    assert short["chosen"].tolist() == [[a, b, c, 0], [a, b, 0, pad]]
    assert short["rejected"].tolist() == [[a, b, 0, pad], [a, c, c, 0]]
    assert (short["records"].tolist(), long["records"].tolist()) == ([0, 2], [1])
    # Of a response its end is a part, be it the token of the padding.
    assert short["chosen_lengths"].tolist() == [4, 3]
    assert short["rejected_lengths"].tolist() == [3, 4]
    assert short["prompt_lengths"].tolist() == [1, 1]
    assert long["prompt_lengths"].tolist() == [5]
    names = ("chosen", "rejected", "chosen_lengths", "rejected_lengths")
    where = diverging(*(jnp.asarray(short[name]) for name in names))
    assert where.tolist() == [[False, False, True, True], [False, True, True, True]]


@pytest.mark.parametrize("encoder", [ENCODER, OTHER_PAD], ids=["pad is end", "own pad"])
def test_the_padding_of_a_pair_does_not_count(encoder):
    """DPO's loss of a pair in a long row is that in a short one, whatever fills it up."""
    tiny = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=257, max_length=16)
    policy, reference = (Transformer(tiny, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    loss = jax.jit(lambda batch: preference_loss(policy, batch, None, reference).mean())
    record = pairs(("ab", "cab", "b"))
    short, long = (pair_rows(record, encoder, lengths=(n,))[n] for n in (6, 12))
    np.testing.assert_allclose(loss(short), loss(long), rtol=1e-5)


def test_pairs_that_are_too_long():
    records = pairs(("a" * 3, "bc", "bd"), ("a", "cccc", "b"), ("a", "b", "c"))
    report = RecordReport()
    rows = pair_rows(records, ENCODER, lengths=(4,), report=report)[4]
    assert rows["records"].tolist() == [2]
    assert report.counts == {"too_long": 2}
    report = RecordReport()
    rows = pair_rows(records, ENCODER, lengths=(4,), too_long="cut", report=report)[4]
    assert rows["records"].tolist() == [1, 2]
    assert report.counts == {"identical": 1}  # they differ behind the cut
    assert rows["chosen"][0].tolist() == IDS("accc")
    assert rows["chosen_lengths"].tolist() == [4, 3]


def test_prompts():
    records = [Record(prompt=text) for text in ("ab", "abcabc", "a", "abcabcab")]
    report = RecordReport()
    rows = prompt_rows(records, OTHER_PAD, lengths=(3, 6), report=report)
    a, b, c = IDS("abc")
    assert rows[3]["input_ids"].tolist() == [[7, a, b], [7, 7, a]]
    assert rows[3]["attention_mask"].tolist() == [[False, True, True], [False, False, True]]
    assert rows[6]["attention_mask"].all()
    assert (rows[3]["records"].tolist(), rows[6]["records"].tolist()) == ([0, 2], [1])
    assert report.counts == {"too_long": 1}
    cut = prompt_rows(records, OTHER_PAD, lengths=(3,), too_long="cut")[3]
    assert cut["input_ids"].tolist() == [[7, a, b], [a, b, c], [7, 7, a], [c, a, b]]


def test_what_stands_before_every_text_is_not_cut_off():
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(ENCODER.tokenizer.to_str())
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    encoder = RecordEncoder(tokenizer=tokenizer)
    cut = lambda n: prompt_rows([Record(prompt="abcd")], encoder, lengths=(n,), too_long="cut")[n]
    assert cut(3)["input_ids"].tolist() == [[0, *IDS("cd")]]
    assert cut(1)["input_ids"].tolist() == [IDS("d")]


def test_records_that_cannot_be_encoded_are_counted():
    records = [Record(prompt=[{"role": "tool", "content": "x"}], chosen="a", rejected="b"), *pairs(("a", "b", "c"))]  # fmt: skip
    for rows in (
        lambda r: fine_tuning_rows(records, ENCODER, length=8, report=r),
        lambda r: pair_rows(records, ENCODER, report=r),
        lambda r: prompt_rows(records, ENCODER, report=r),
    ):
        report = RecordReport()
        rows(report)
        assert report.counts == {"wrong_type": 1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fine_tuning_rows([Record(prompt="a")], ENCODER, length=4), "record 0 has no chosen"),
        (lambda: pair_rows([Record(prompt="a", chosen="b")], ENCODER), "record 0 has no rejected"),
        (lambda: fine_tuning_rows(pairs("abc"), ENCODER, length=0), "length must be at least 1, got 0"),
        (lambda: pair_rows(pairs("abc"), ENCODER, lengths=()), r"lengths must be .* got \(\)"),
        (lambda: prompt_rows(pairs("abc"), ENCODER, lengths=(0, 4)), r"lengths must be .* got \(0, 4\)"),
        (lambda: next(row_batches({"a": np.ones(3)}, 4, epoch=0)), "batch_size must be at most .*3.*, got 4"),
        (lambda: next(row_batches({"a": np.ones(3)}, 0, epoch=0)), "batch_size must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_batches_of_an_epoch():
    records = [Record(prompt="a" * (i % 7 + 1)) for i in range(50)]
    rows = prompt_rows(records, ENCODER, lengths=(3, 7))
    epochs = [list(row_batches(rows, 4, epoch=number, seed=3)) for number in (0, 1, 0)]
    for batches in epochs:
        assert all(batch["input_ids"].shape in ((4, 3), (4, 7)) for batch in batches)
        taken = [i for batch in batches for i in batch["records"].tolist()]
        assert (
            len(taken) == len(set(taken)) == sum(len(r["records"]) // 4 * 4 for r in rows.values())
        )
        for batch in batches:  # a row keeps what is its own
            lengths = [len(records[i].prompt) for i in batch["records"]]
            assert batch["attention_mask"].sum(1).tolist() == lengths
    assert [b["records"].tolist() for b in epochs[0]] == [b["records"].tolist() for b in epochs[2]]
    assert [b["records"].tolist() for b in epochs[0]] != [b["records"].tolist() for b in epochs[1]]
    widths = [batch["input_ids"].shape[1] for batch in epochs[0]]
    assert widths not in (sorted(widths), sorted(widths, reverse=True))  # lengths take turns
