"""The study random_ltd_bert: its data, two steps of every arm, the paper's setting, and wrong options."""

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.data import parse_source, prepare_corpus
from effscale.experiments import random_ltd_bert
from effscale.experiments.random_ltd_bert import PRESETS, Early, main
from effscale.experiments.shared.bert import ModelConfig
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.dropping import Dropping
from effscale.experiments.shared.masked_text import HideTokens, hidden_rows, passages_data
from effscale.interop import load_pretrained, load_tokenizer
from effscale.study import Search
from effscale.study.command import conduct


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    """The --corpus option of documents of which each has words of its own, and six long ones."""
    chosen = random.Random(3)
    file = tmp_path_factory.mktemp("corpus") / "topics.jsonl"
    with file.open("w") as out:
        for number in range(40):
            words = [f"w{number}{letter}" for letter in "abc"] + ["the", "of"]
            count = 900 if number < 6 else 60
            text = " ".join(chosen.choice(words) for _ in range(count))
            out.write(json.dumps({"text": text}) + "\n")
    return f"jsonl:{file}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(topics, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    return prepare_corpus(parse_source(topics), folder, vocab_size=300, validation_fraction=0.2)


@given(
    st.integers(1, 60), st.integers(0, 20), st.floats(0.01, 0.9), st.integers(0, 9), st.integers(0)
)
def test_hidden_tokens_are_told_and_the_others_are_as_they_were(real, padding, hidden, seed, place):
    ids = np.random.default_rng(real).integers(0, 50, real + padding).astype(np.int32)
    segments = np.where(np.arange(real + padding) < real, 1, 0)
    row = {"input_ids": ids, "segment_ids": segments, "positions": np.arange(real + padding)}
    hide = HideTokens(vocab_size=50, end=0, hidden=hidden, seed=seed)
    place %= 2**63
    made, again = hide(place, row), hide(place, dict(row))
    asked = made["labels"] != -100
    candidates = (segments == 1) & (ids != 0)
    assert not (asked & ~candidates).any()
    wanted = min(candidates.sum(), max(1, round(hidden * candidates.sum())))
    assert asked.sum() == wanted == made["loss_weights"].sum()
    assert (made["labels"][asked] == ids[asked]).all()
    assert (made["input_ids"][~asked] == ids[~asked]).all()
    assert made["input_ids"].max() <= 50
    for name in made:
        assert np.array_equal(made[name], again[name])


def test_of_hidden_tokens_four_in_five_are_masked_and_one_in_ten_stays():
    ids = np.random.default_rng(0).integers(1, 200, 1000).astype(np.int32)
    row = {"input_ids": ids, "segment_ids": np.ones(1000, int), "positions": np.arange(1000)}
    hide = HideTokens(vocab_size=200, end=0, hidden=0.15, seed=0)
    rows = [hide(place, row) for place in range(200)]
    shown = np.array([r["input_ids"] for r in rows])
    asked = np.array([r["labels"] != -100 for r in rows])
    assert (asked.sum(1) == 150).all()
    masked, stays = (shown == 200)[asked].mean(), (shown == ids)[asked].mean()
    assert masked == pytest.approx(0.8, abs=0.01)
    assert stays == pytest.approx(0.1 + 0.1 / 200, abs=0.01)
    # Every position is hidden as often as any other, and each row hides different ones.
    assert abs(asked.mean(0) - 0.15).max() < 0.12
    assert not np.array_equal(asked[0], asked[1])
    other = HideTokens(vocab_size=200, end=0, hidden=0.15, seed=1)(0, row)
    assert not np.array_equal(other["labels"], rows[0]["labels"])


def test_rows_go_on_where_they_stopped_and_are_hidden_anew_in_each_epoch(corpus):
    make = lambda: iter(
        hidden_rows((corpus,), None, validation=False, length=16, batch_size=8, hidden=0.2, seed=4)
    )
    rows, state = make(), None
    batches = []
    for number in range(90):  # more than an epoch
        if number == 70:
            state = rows.get_state()
        batches.append(next(rows))
    resumed = make()
    resumed.set_state(state)
    for batch in batches[70:]:
        for name, value in next(resumed).items():
            assert np.array_equal(value, batch[name])
    truth, asked = {}, {}
    for batch in batches:
        told = np.where(batch["labels"] >= 0, batch["labels"], batch["input_ids"])
        for row, labels in zip(told, batch["labels"], strict=True):
            key = row.tobytes()
            truth[key] = truth.get(key, 0) + 1
            asked.setdefault(key, []).append(np.flatnonzero(labels >= 0).tolist())
    repeated = [key for key, count in truth.items() if count > 1]
    assert repeated
    assert all(asked[key][0] != asked[key][1] for key in repeated[:3])


def test_held_out_rows_come_once_and_padding_asks_nothing(corpus):
    batches = list(
        hidden_rows((corpus,), None, validation=True, length=16, batch_size=8, hidden=0.2, seed=0)
    )
    assert all(batch["labels"].shape == (8, 16) for batch in batches)
    real = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
    assert real // 16 == (corpus.validation.num_tokens - 1) // 16
    for batch in batches:
        assert (batch["loss_weights"][batch["segment_ids"] == 0] == 0).all()
    assert batches[-1]["segment_ids"][-1].max() == 0  # a row that only fills the batch up


def test_passages_are_of_their_documents_and_test_ones_come_later(corpus):
    config = random_ltd_bert.Config(
        classes=3, passage=16, finetune=Recipe(batch_size=4, train=12, test=6)
    )
    data = passages_data((corpus,), config)
    assert np.bincount(data.train.labels).tolist() == [4, 4, 4]
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]
    store = corpus.train
    lengths = np.diff(np.asarray(store.offsets))
    largest = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))[:3]
    for label, number in enumerate(largest):
        text = store.document(number)[:-1].tolist()  # without the token that ends it
        places = []
        for part in (data.train, data.test):
            rows = [ids for ids, n in zip(part.ids, part.labels, strict=True) if n == label]
            at = [
                [i for i in range(0, len(text), 16) if tuple(text[i : i + 16]) == row]
                for row in rows
            ]
            assert all(len(found) == 1 for found in at)  # no passage is there twice
            places.append([found[0] for found in at])
        assert len(set(places[0])) == 4
        assert len(set(places[1])) == 2
        assert max(places[0]) < 3 / 4 * len(text) - 16 < min(places[1])
    with pytest.raises(
        ValueError,
        match=r"Config.finetune.train=8: must give at least finetune.batch_size=8 .* over classes=3, but gives 6",
    ):
        passages_data(
            (corpus,),
            random_ltd_bert.Config(
                classes=3, passage=8, finetune=Recipe(batch_size=8, train=8, test=6)
            ),
        )
    with pytest.raises(
        ValueError, match=r"Config.classes must be at most the \d+ documents of the corpus, got 99"
    ):
        passages_data(
            (corpus,),
            random_ltd_bert.Config(classes=99, finetune=Recipe(batch_size=4, train=99, test=99)),
        )
    with pytest.raises(
        ValueError, match=r"Config.finetune.train=3000: must be at most .* with classes=3 and"
    ):
        passages_data(
            (corpus,),
            random_ltd_bert.Config(classes=3, finetune=Recipe(batch_size=4, train=3000, test=3)),
        )


def test_two_steps_of_every_arm(topics, tmp_path):
    """The whole study: 16 tokens, of which the middle one of 3 layers keeps 4 in the first step and 6 in the second."""
    config = random_ltd_bert.Config(
        seeds=1,
        corpus=(topics,),
        validation_fraction=0.2,
        cache=tmp_path / "cache",
        vocab_size=300,
        length=16,
        batch_size=8,
        steps=2,
        model=ModelConfig(num_layers=3, d_model=16, num_heads=2),
        ltd=Dropping(min_value=4, seq_per_step=6, share=1.0),
        warmup=0.0,
        search=Search(learning_rate_factor=2.0, points=2),
        early=Early(seeds=2, steps=1),
        eval_batches=1,
        classes=2,
        passage=16,
        finetune=Recipe(epochs=1, batch_size=8, train=16, test=16),
        out=tmp_path / "run",
    )
    figures = conduct(config, random_ltd_bert.study).figures

    def records(name):
        lines = (tmp_path / "run" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    steps = {arm: records(f"{arm}/seed-0")[:2] for arm in ("baseline", "random_ltd")}
    assert [record["tokens"] for record in steps["baseline"]] == [128, 256]
    assert [record["tokens"] for record in steps["random_ltd"]] == [96, 8 * (12 + 38 // 3)]
    assert steps["baseline"][0]["weight"] == steps["random_ltd"][0]["weight"]  # the same mask
    for arm in steps:
        tried = {
            rate: records(f"search/{arm}/rate-{rate:g}_warmup-{warmup}")
            for rate, warmup in ((1e-3, 0), (5e-4, 1))
        }
        for rate, found in tried.items():
            assert max(record.get("learning_rate", 0) for record in found) == pytest.approx(rate)
        best = min(tried, key=lambda rate: tried[rate][-1]["val_loss"])
        assert figures[f"{arm}_learning_rate"] == best
        assert figures[f"{arm}_search_runs"] == 2
        first = [records(f"{arm}_early/seed-{seed}") for seed in (0, 1)]
        assert all(found[0]["learning_rate"] == pytest.approx(3e-3) for found in first)
        mean = np.mean([found[-1]["val_loss"] for found in first])
        assert figures[f"{arm}_early_val_loss"] == pytest.approx(mean)
        assert 0 <= figures[f"{arm}_early_not_below_entropy"] <= 2
    for start in (*steps, "scratch"):
        task = records(f"{start}/seed-0/passages")[-1]
        assert figures[f"{start}_accuracy"] == task["test_accuracy"]
    model = load_pretrained(tmp_path / "run/random_ltd/seed-0/pretrained")
    tokenizer = load_tokenizer(tmp_path / "run/random_ltd/seed-0/pretrained")
    mask = tokenizer.token_to_id("[MASK]")
    assert model(jnp.array([[5, mask, 7]], jnp.int32))["mlm"].shape == (1, 3, mask + 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--accumulate", "3"], "Config.accumulate must be a divisor of batch_size=8, got 3"),
        (["--passage", "17"], "Config.passage must be at most the 16 tokens of a row, got 17"),
        (["--classes", "1"], "Config.classes must be at least 2, got 1"),
        (
            ["--classes", "50", "--finetune.test", "64"],
            "Config.classes must be at most the 34 documents of the corpus, got 50",
        ),
        (["--finetune.test", "None"], "Recipe.test must be a number of passages, at least"),
        (
            ["--finetune.train", "6400"],
            "Config.finetune.train=6400: must be at most 188 with classes=2 and passage=16",
        ),
        (
            ["--ltd.min-value", "17"],
            "Dropping.min_value must be at most the 16 tokens of a row, got 17",
        ),
        (["--model.num-layers", "2"], "Use a model with at least 3 layers"),
        (
            ["--early.steps", "13"],
            "Early.steps must be at most the steps=12 of a whole run, got 13",
        ),
        (
            ["--search.seed", "0"],
            "Search.seed must be at least seeds=1, so that no compared run uses it, got 0",
        ),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, topics, cache, refused):
    options = [
        *("--preset", "smoke", "--corpus", topics, "--validation-fraction", "0.2"),
        *("--cache", str(cache), "--vocab-size", "300", "--length", "16", "--passage", "16"),
        *("--steps", "12", "--ltd.min-value", "4", "--early.steps", "6", "--classes", "2"),
        *("--finetune.train", "64", "--finetune.test", "32"),
    ]
    assert message in refused(main, [*options, *words])


@pytest.mark.parametrize(("stage", "kept"), [(0, 128), (-1, 496)])
def test_the_papers_setting_lowers(stage, kept):
    """A layer that drops tokens between two that do not, with the paper's shapes."""
    config = PRESETS["paper"]
    whole = random_ltd_bert.plan(config, "random_ltd", config.vocab_size)
    assert whole.stages.values[stage] == kept
    assert 0.63 < whole.layer_tokens / (config.steps * 1024 * 512) < 0.65  # published: 64.2 %
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=3))
    plan = random_ltd_bert.plan(config, "random_ltd", config.vocab_size)
    rows = jax.ShapeDtypeStruct((config.batch_size, config.length), jnp.int32)
    batch = dict.fromkeys(("input_ids", "labels", "segment_ids", "positions"), rows)
    text = random_ltd_bert.run(config, plan).lower(batch=batch, stage=stage).as_text()
    assert f"64x{kept}x1024" in text
