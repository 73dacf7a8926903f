import json
import random
import shutil
import string

import jax
import numpy as np
import pytest
from flax import nnx

from effscale.experiments.shared import assets
from effscale.experiments.shared.classifier.batches import Texts, TrainingBatches
from effscale.experiments.shared.classifier.cutting import cut_passages
from effscale.experiments.xtc import runs
from effscale.experiments.xtc.arms import Arm
from effscale.experiments.xtc.config import Config
from effscale.experiments.xtc.experiment import main
from effscale.experiments.xtc.passages import Passages, read_passages
from effscale.interop import load_tokenizer, save_pretrained
from effscale.models import Transformer, bert
from effscale.quant import model_size, w1a8
from effscale.training import RunFolder, ScheduleConfig, TrainingDivergedError
from effscale.training.saved import config_from_json


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a run that takes seconds: a small random BERT, and three documents that have words of their own."""
    place = tmp_path_factory.mktemp("xtc")
    config = bert(num_layers=4, d_model=16, num_heads=2, vocab_size=60, max_length=16)
    model = Transformer(config, rngs=nnx.Rngs(0))
    save_pretrained(jax.tree.map(lambda x: 8 * x if x.ndim == 3 else x, model), place / "text")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *string.ascii_lowercase]
    words += ["##" + letter for letter in string.ascii_lowercase]
    (place / "text" / "vocab.txt").write_text("\n".join(words))
    chosen = random.Random(3)
    with (place / "topics.jsonl").open("w") as out:
        for letters, count in (("abcde", 640), ("fghde", 620), ("klmde", 630), ("xyz", 9)):
            text = " ".join(chosen.choice(letters) for _ in range(count))
            out.write(json.dumps({"text": text}) + "\n")
    return [
        *("--corpus", f"jsonl:{place / 'topics.jsonl'}", "--text-model", str(place / "text")),
        *("--seeds", "1", "--classes", "3", "--passage", "8", "--train", "48", "--dev", "18"),
        *("--test", "18", "--batch-size", "8", "--teacher-layers", "1", "3"),
        *("--teacher-steps", "20", "--budgets", "12", "--rates", "2e-3", "1e-2"),
        *("--evaluations", "1"),
    ]


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    main([*options, "--out", str(out)])
    return out


def records(folder, name):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


ARMS = ("teacher", "float_2_layers", "ternary_2_layers", "binary_2_layers")


def test_what_a_run_finds(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["majority"] == pytest.approx(1 / 3)
    assert results["teacher_accuracy"] > 0.6
    assert results["float_2_layers_accuracy"] > 0.6
    sizes = [results[f"{arm}_mb"] for arm in ARMS]
    assert sizes == sorted(sizes, reverse=True)
    assert results["teacher_times_smaller"] == 1
    for arm in ("ternary_2_layers", "binary_2_layers"):
        # The packed model is what was trained, up to the rounding of inputs.
        assert results[f"{arm}_agreement"] >= 0.9
        assert results[f"{arm}_logit_difference"] < 0.05
        assert results[f"{arm}_accuracy"] == pytest.approx(results[f"{arm}_trained_accuracy"], abs=0.1)  # fmt: skip
        assert results[f"{arm}_accuracy"] == results[f"{arm}_12_steps_accuracy"]
        assert results[f"{arm}_accuracy"] == results["seeds"][f"{arm}_accuracy"][0]
        assert results[f"{arm}_codes_mb"] < results[f"{arm}_mb"]
        assert f"{arm}_untrained_accuracy" in results
    student = bert(num_layers=2, d_model=16, num_heads=2, vocab_size=60, max_length=16, pooler=False)  # fmt: skip
    head = (16 + 1) * 3 * 4
    assert results["binary_2_layers_mb"] == (model_size(student, w1a8()).total + head) / 1e6
    for figure in ("size.png", "budget.png"):
        file = finished / "figures" / figure
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size < 100_000
    report = (finished / "report.md").read_text()
    assert "| arm | untrained | 12 |" in report
    assert "| teacher | 20 |" in report


def test_every_arm_tries_every_rate_and_the_best_on_dev_is_taken(finished):
    results = json.loads((finished / "results.json").read_text())
    for arm in ARMS:
        for steps in (20,) if arm == "teacher" else (12,):
            tried = {}
            for rate in (2e-3, 1e-2):
                found = records(finished, f"{arm}/steps-{steps}/rate-{rate:g}/seed-0")
                assert found[-1]["step"] == steps
                dev = [record["dev_accuracy"] for record in found if "dev_accuracy" in record]
                assert len(dev) == 1
                tried[rate] = max(dev)
            taken = results[f"{arm}_{steps}_steps_rate"]
            assert tried[taken] == max(tried.values())


def test_only_the_best_models_of_the_runs_that_count_are_kept(finished):
    """Of the longest budget, and of one learning rate."""
    kept = sorted(path.relative_to(finished).parts[:2] for path in finished.rglob("best"))
    students = [(arm, "steps-12") for arm in ARMS[1:]]
    assert kept == sorted([("teacher", "steps-20"), *students])
    assert not list(finished.rglob("checkpoints"))


def test_a_finished_run_has_nothing_left_to_do(finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    monkeypatch.setattr(TrainingBatches, "__next__", None)
    main(["--out", str(out), "--resume"])
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (finished, out))
    for results in (one, other):
        for name in ("seconds", "peak_memory_mb", "folder"):
            results.pop(name)
    assert one == other


def test_a_run_that_diverges_counts_with_what_was_best_before(tmp_path, monkeypatch):
    texts = Texts(((1, 2), (3, 4)), np.arange(2), 2)
    arm = Arm(kind="float", config=Config(batch_size=2))
    folder = RunFolder.create(tmp_path / "run", name="xtc", config=arm.config)
    of_seed = lambda seed: None
    runner = runs.Runner(
        arm, Passages(texts, texts, texts, 2), folder, origin=of_seed, teacher=of_seed
    )

    def diverge(folder, name, *given, **options):
        metrics = [{"step": 7, "dev_accuracy": 0.25}, {"step": 14, "dev_accuracy": 0.5}]
        lines = "".join(json.dumps(each) + "\n" for each in metrics if "0.001" not in name)
        (folder.path / name / "metrics.jsonl").write_text(lines)
        raise TrainingDivergedError(20, 10, None, "")

    monkeypatch.setattr(runs, "train_to_end", diverge)
    assert runner._run(25, 1e-4, 0) == 0.5
    assert runner._run(25, 1e-3, 0) == 0.0  # before the first evaluation
    folder.close()


def test_passages_of_three_splits_do_not_overlap(options, finished):
    saved = json.loads((finished / "config.json").read_text())["config"]
    config = config_from_json(Config, saved)
    data = read_passages(config, load_tokenizer(config.text_model))
    for texts, count in ((data.train, 16), (data.dev, 6), (data.test, 6)):
        assert np.bincount(texts.labels).tolist() == [count] * 3
        assert all(len(ids) == 8 for ids in texts.ids)
    document = list(range(400))
    made = cut_passages([document], 4, {"train": 75, "dev": 10, "test": 15}, field="Config")
    starts = {split: [ids[0] for ids in texts.ids] for split, texts in made.items()}
    assert starts["train"] == list(range(0, 300, 4))
    assert sorted(starts["dev"] + starts["test"]) == list(range(300, 400, 4))
    assert np.abs(np.mean(starts["dev"]) - np.mean(starts["test"])) < 8  # they take turns
    with pytest.raises(ValueError, match=r"Config.dev=20 and Config.test=6: .* at most 25 with"):
        cut_passages([document], 4, {"train": 1, "dev": 20, "test": 6}, field="Config")


def test_the_rate_rises_and_falls_as_the_schedule_of_other_experiments():
    config = Config(rates=(0.5,), warmup=0.2)
    optimizer = Arm(kind="float", config=config).optimizer(0.5, 20)
    wanted = ScheduleConfig(kind="linear", peak=0.5, warmup=4, total=20).build()
    params = {"w": np.zeros((2, 2), np.float32)}
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for step in range(20):
            # The first update of Adam is the sign of the gradient, and so are all of a constant one.
            updates, state = optimizer.update({"w": np.ones((2, 2), np.float32)}, state, params)
            np.testing.assert_allclose(-updates["w"], float(wanted(step)), atol=1e-5)


@pytest.mark.slow  # make aot compiles it
def test_the_papers_setting_can_be_lowered():
    from benchmarks.aot.experiments import lower_xtc

    lowered = lower_xtc(jax.devices())
    text = lowered.as_text()
    assert "6x768x3072" in text  # the student's
    assert "12x768x3072" in text  # the teacher's
    assert lowered.out_info[1]["scores_loss"].shape == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher-layers", "1", "4"], "must be numbers of the model's layers, 0 to 3"),
        (["--classes", "5"], "Config.classes must be at most the 4 documents of the corpus, got 5"),
        (["--classes", "4"], "because document 3 has 9 tokens"),
        (["--train", "480"], "with classes=3 and passage=8"),
        (["--passage", "17"], "Config.passage must be at most the model's 16, got 17"),
        (["--budgets", "9", "3"], "Config.budgets must be ascending, got (9, 3)"),
        (["--rates", "0"], "Config.rates must be at least one number above 0, got (0.0,)"),
        (["--dev", "2"], "Config.dev must be a number of passages, at least classes=3, got 2"),
        (
            ["--batch-size", "49"],
            "Config.batch_size must be at most train=48, equally many of each class, got 49",
        ),
        (["--text-model", "absent"], "absent"),
        (["--resume"], "set together with --out"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, options, refused):
    assert message in refused(main, [*options, *words])


@pytest.mark.slow  # the other tests run smaller ones
def test_smoke(start, tmp_path):
    """The preset smoke, on the real model."""
    try:
        assets.minilm_folder()
    except assets.MissingAssetError as error:
        pytest.skip(str(error))
    out = tmp_path / "run"
    done = start("-m", "effscale.experiments.xtc", "--preset", "smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert 17 < results["ternary_3_layers_times_smaller"] < 18
    assert 28 < results["binary_3_layers_times_smaller"] < 30
    assert "Test accuracy" in done.stdout
