import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from effscale.data import parse_source, prepare_corpus
from effscale.experiments.random_ltd_bert.config import PRESETS, Config, Early
from effscale.experiments.random_ltd_bert.experiment import main
from effscale.experiments.random_ltd_bert.runs import Pretraining
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.masked_text import HideTokens, hidden_rows, passages_data
from effscale.experiments.shared.random_ltd.arms import ARMS, Arm
from effscale.interop import load_pretrained, load_tokenizer
from effscale.models import Transformer
from effscale.study.search import Point
from effscale.training import (
    RunFolder,
    StagedStep,
    TrainingDivergedError,
    create_train_state,
    masked_token_loss,
)


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
def options(topics, tmp_path_factory):
    """Options of a run that takes seconds."""
    return [
        *("--preset", "smoke", "--corpus", topics, "--validation-fraction", "0.2"),
        *("--cache", str(tmp_path_factory.mktemp("cache")), "--vocab-size", "300"),
        *("--length", "16", "--passage", "16", "--classes", "2", "--eval-every", "6"),
        *("--steps", "12", "--ltd.min-value", "4", "--ltd.seq-per-step", "6"),
        *("--finetune.train", "64", "--finetune.test", "32", "--finetune.epochs", "3"),
        *("--finetune.learning-rate", "2e-2", "--model.d-model", "16"),
        *("--warmup", "0.25", "--learning-rate", "3e-3", "--early.steps", "6"),
    ]


@pytest.fixture(scope="module")
def watched(options, tmp_path_factory):
    """A finished run, and by arm the batches and the initial weights of all its runs."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    batches, states = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        before_step, create = StagedStep.before_step, Pretraining._create

        def watch(staged, step, batch):
            assert step < 1 or staged.num_compilations == len(staged.stages.values)
            batches.setdefault(id(staged), []).append(batch)
            return before_step(staged, step, batch)

        def keep(pretraining, seed, point):
            state = create(pretraining, seed, point)
            model = jax.device_get(nnx.to_pure_dict(nnx.state(state.model)))
            states.setdefault(pretraining.arm.name, []).append(model)
            return state

        patch.setattr(StagedStep, "before_step", watch)
        patch.setattr(Pretraining, "_create", keep)
        main([*options, "--out", str(out)])
    return out, [*batches.values()], states


@pytest.fixture(scope="module")
def finished(watched):
    return watched[0]


@pytest.fixture(scope="module")
def corpus(topics, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    return prepare_corpus(parse_source(topics), folder, vocab_size=300, validation_fraction=0.2)


def records(folder, name):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


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
    config = Config(classes=3, passage=16, finetune=Recipe(batch_size=4, train=12, test=6))
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
            Config(classes=3, passage=8, finetune=Recipe(batch_size=8, train=8, test=6)),
        )
    with pytest.raises(
        ValueError, match=r"Config.classes must be at most the \d+ documents of the corpus, got 99"
    ):
        passages_data(
            (corpus,), Config(classes=99, finetune=Recipe(batch_size=4, train=99, test=99))
        )
    with pytest.raises(
        ValueError, match=r"Config.finetune.train=3000: must be at most .* with classes=3 and"
    ):
        passages_data(
            (corpus,), Config(classes=3, finetune=Recipe(batch_size=4, train=3000, test=3))
        )


def test_a_run_counts_what_its_layers_see(finished):
    # 16 tokens, the middle one of 3 layers drops; 4 are kept, then 6 and 12, and never all, as the run ends before.
    kept = [max(4, int(t / 12 * 12 + 4) // 6 * 6) for t in range(12)]
    assert kept == [4, 4] + [6] * 6 + [12] * 4
    tokens = 8 * np.cumsum([(16 * 2 + r) // 3 for r in kept])
    losses = [r for r in records(finished, "seed-0/random_ltd") if "loss" in r]
    assert [r["tokens"] for r in losses] == tokens.tolist()
    results = json.loads((finished / "results.json").read_text())
    assert results["random_ltd_layer_tokens"] == tokens[-1]
    assert results["baseline_layer_tokens"] == 8 * 16 * 12
    layer = lambda n: n * (4 * 16 * 16 + 2 * 16 * 64) + 2 * 16 * n**2
    vocabulary = load_pretrained(finished / "seed-0/baseline/model").config.inputs.vocab_size
    head = 16 * (16 * 16 + 16 * vocabulary)
    flops = sum(6 * 8 * (head + 2 * layer(16) + layer(r)) for r in kept)
    assert results["random_ltd_teraflops"] == pytest.approx(flops / 1e12)


def test_arms_get_the_same_rows_hidden_tokens_and_weights(watched):
    _, (plain, dropping), states = watched
    assert len(plain) == len(dropping) == 2 * 12 + 12 + 2 * 6  # search, compared run, first steps
    for one, other in zip(plain, dropping, strict=True):
        assert one.keys() == other.keys() >= {"input_ids", "labels"}
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert not np.array_equal(plain[0]["labels"], plain[1]["labels"])
    assert not np.array_equal(
        plain[0]["labels"], plain[24]["labels"]
    )  # the search has its own seed
    jax.tree.map(np.testing.assert_array_equal, states["baseline"], states["random_ltd"])


def test_both_arms_warm_up_in_the_same_steps_and_then_follow_the_layer_tokens(finished):
    results = json.loads((finished / "results.json").read_text())
    found = {a: (results[f"{a}_learning_rate"], results[f"{a}_warmup_steps"]) for a in ARMS}
    runs = {
        **{f"search/{arm}/rate-{r:g}_warmup-3": (r, 3) for arm in ARMS for r in (3e-3, 1.5e-3)},
        **{f"seed-0/{arm}": found[arm] for arm in ARMS},
        **{f"early/seed-{seed}/{arm}": (3e-3, 3) for arm in ARMS for seed in (0, 1)},
    }
    assert {
        path.parent.relative_to(finished).as_posix() for path in finished.rglob("done.json")
    } - {f"seed-0/{start}/passages" for start in (*ARMS, "scratch")} == runs.keys()
    for name, (peak, warmup) in runs.items():
        steps = [r for r in records(finished, name) if "loss" in r]
        assert len(steps) == (6 if name.startswith("early") else 12)
        arm = "random_ltd" if name.endswith("random_ltd") or "/random_ltd/" in name else "baseline"
        tokens = np.array([0] + [r["tokens"] for r in steps])[:-1]
        origin, total = tokens[warmup], results[f"{arm}_layer_tokens"]
        decay = 1 - 0.9 * (tokens - origin) / (total - origin)
        count = np.arange(len(steps))
        wanted = peak * np.where(count < warmup, count / warmup, decay)
        np.testing.assert_allclose([r["learning_rate"] for r in steps], wanted, rtol=1e-4)


def test_each_arm_takes_the_best_pair_of_its_search(finished):
    results = json.loads((finished / "results.json").read_text())
    for arm in ARMS:
        losses = {
            rate: records(finished, f"search/{arm}/rate-{rate:g}_warmup-3")[-1]["val_loss"]
            for rate in (3e-3, 1.5e-3)
        }
        assert results[f"{arm}_learning_rate"] == min(losses, key=losses.__getitem__)
        assert (results[f"{arm}_search_runs"], results[f"{arm}_search_settled"]) == (2, 0)
    report = (finished / "report.md").read_text()
    assert "| arm | learning rate | warmup steps | loss | runs | all neighbors tried |" in report
    assert "| learning rate | warmup steps | baseline | random-LTD |" in report


def test_the_first_steps_are_reported_of_every_seed(finished):
    results = json.loads((finished / "results.json").read_text())
    for arm in ARMS:
        each = [records(finished, f"early/seed-{seed}/{arm}")[-1] for seed in (0, 1)]
        losses = [record["part_val_loss"] for record in each]
        assert results[f"{arm}_early_val_loss"] == pytest.approx(np.mean(losses))
        assert results[f"{arm}_early_val_loss_std"] == pytest.approx(np.std(losses, ddof=1))
        above = sum(loss >= results["unigram_entropy"] for loss in losses)
        assert results[f"{arm}_early_not_below_entropy"] == above
    assert "The first 6 steps at 0.003" in (finished / "report.md").read_text()


def test_an_arm_is_searched_by_itself_and_a_run_that_diverges_is_a_result(
    corpus, tmp_path, monkeypatch
):
    best = {"baseline": Point(1e-3, 20), "random_ltd": Point(2e-3, 40)}
    made = []

    def train(pretraining, folder, name, seed, point, steps):
        made.append((name, seed, steps))
        (folder.path / name).mkdir(parents=True)
        goal = best[pretraining.arm.name]
        if point.learning_rate > goal.learning_rate:
            raise TrainingDivergedError(7, 10, None)
        loss = abs(np.log2(point.learning_rate / goal.learning_rate))
        loss += abs(np.log2(point.warmup / goal.warmup))
        record = {"step": steps, "val_loss": float(loss), "part_val_loss": float(loss)}
        (folder.path / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")

    monkeypatch.setattr(Pretraining, "_train", train)
    config = Config(steps=200, early=Early(steps=50, learning_rate=2e-3))
    folder = RunFolder.create(tmp_path / "run", name="random_ltd_bert", config=config)
    found = {}
    for arm in ARMS:
        pretraining = Pretraining(arm, config, (corpus,), None)
        found[arm] = pretraining.search(folder)
        count = len(made)
        assert pretraining.search(folder) == found[arm]  # finished runs are not made again
        assert len(made) == count <= config.search.points * len(found)
        at_high_rate = pretraining.early(folder, 3)
        assert at_high_rate == (np.inf if arm == "baseline" else 1.0)
        assert made[-1] == (f"early/seed-3/{arm}", 3, 50)
        pretraining.step.close()
    assert {arm: each.best for arm, each in found.items()} == best
    assert all(each.settled for each in found.values())
    assert found["baseline"].losses[Point(2e-3, 20)] == np.inf
    assert {(seed, steps) for name, seed, steps in made if "search" in name} == {(1000, 200)}


def test_a_run_leaves_what_it_promises(finished):
    results = json.loads((finished / "results.json").read_text())
    assert all(np.isfinite(v) for v in results.values() if isinstance(v, int | float))
    for arm in ("baseline", "random_ltd"):
        last = records(finished, f"seed-0/{arm}")[-1]
        assert results[f"{arm}_val_loss"] == last["val_loss"]
        assert last["val_loss"] < records(finished, f"seed-0/{arm}")[0]["loss"]
    for start in ("baseline", "random_ltd", "scratch"):
        accuracy = records(finished, f"seed-0/{start}/passages")[-1]["test_accuracy"]
        assert results[f"{start}_accuracy"] == accuracy > results["majority"] + 0.2
    assert results["majority"] == 0.5
    report = (finished / "report.md").read_text()
    for shown in ("| random weights |", "| thousand layer tokens |", "nats per hidden token"):
        assert shown in report
    figure = finished / "figures" / "loss.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size < 100_000
    assert not list(finished.rglob("checkpoints"))


def test_the_pretrained_model_is_a_folder_with_its_tokenizer(finished):
    place = finished / "seed-0" / "random_ltd" / "model"
    model, tokenizer = load_pretrained(place), load_tokenizer(place)
    mask = tokenizer.token_to_id("[MASK]")
    assert mask == tokenizer.get_vocab_size() - 1
    assert model.config.inputs.vocab_size == tokenizer.get_vocab_size()
    logits = model(jnp.array([[5, mask, 7]], jnp.int32))["mlm"]
    assert logits.shape == (1, 3, mask + 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hidden", "1"], "Config.hidden must be between 0 and 1, got 1.0"),
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
        (["--corpus", "stdlob"], "Did you mean 'stdlib'"),
        (["--learning-rate", "inf"], "Config.learning_rate must be a finite number, got inf"),
        (
            ["--early.steps", "13"],
            "Early.steps must be at most the steps=12 of a whole run, got 13",
        ),
        (
            ["--search.seed", "0"],
            "Search.seed must be at least seeds=1, so that no compared run uses it, got 0",
        ),
        (["--resume"], "set together with --out"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, options, refused):
    assert message in refused(main, [*options, *words])


@pytest.mark.parametrize("kept", [128, 496])
def test_the_papers_setting_can_be_lowered(kept):
    config = PRESETS["paper"]
    model = config.model.build(config.vocab_size + 1, config.length)
    arm = Arm(
        name="random_ltd",
        model=model,
        dropping=config.ltd,
        length=config.length,
        batch_size=config.batch_size,
        num_steps=config.steps,
    )
    assert (arm.stages.values[0], arm.stages.values[-1]) == (128, 496)
    assert 0.63 < arm.total_layer_tokens / (config.steps * 1024 * 512) < 0.65  # published: 64.2 %
    optimizer = arm.optimizer(config.rate(config.start), config.optimizer)
    step = arm.train_step(
        masked_token_loss,
        optimizer,
        clip_norm=config.clip_norm,
        accumulate=config.accumulate,
    )

    def create():
        trained = Transformer(model, rngs=nnx.Rngs(0))
        return create_train_state(trained, optimizer, key=jax.random.key(0))

    shape = (config.batch_size, config.length)
    names = ("input_ids", "labels", "segment_ids", "positions")
    batch = dict.fromkeys(names, jax.ShapeDtypeStruct(shape, jnp.int32))
    lowered = jax.jit(step).lower(jax.eval_shape(create), arm.shape_batch(batch, kept))
    assert f"64x{kept}x1024" in lowered.as_text()
    assert lowered.out_info[1]["loss"].shape == ()
