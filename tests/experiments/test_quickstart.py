import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.experiments.quickstart import PRESETS, Config, load, main, run, sample
from effscale.models import num_params, preset
from effscale.training import CheckpointError, fetch_run
from effscale.training.saved import config_from_json

MIRROR = "memory://runs/one"
KEYS = {"val_loss", "unigram_entropy", "tokens_seen", "tokens_per_second", "num_params"}


@pytest.fixture(scope="module")
def folder(options, tmp_path_factory):
    """A finished run, long enough to learn."""
    out = tmp_path_factory.mktemp("runs") / "one"
    words = ["--steps", "60", "--learning-rate", "1e-2", "--samples", "the cat", "every "]
    main([*options, *words, "--out", str(out), "--mirror", MIRROR])
    return out


def test_a_run_leaves_what_it_promises(folder):
    results = json.loads((folder / "results.json").read_text())
    assert results.keys() >= KEYS
    assert results["tokens_seen"] == 60 * 8 * 32
    assert results["folder"] == str(folder)
    # The sentences have a structure: whoever learns it knows more than the tokens' frequencies.
    assert results["val_loss"] < 0.8 * results["unigram_entropy"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 61))
    assert [r["step"] for r in records if "part_val_loss" in r] == [12, 24, 36, 48, 60]
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["steps"] == 60
    assert config["versions"]["jax"]
    for name in ("figures/loss.png", "figures/speed.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "tokenizer.json").is_file()
    assert f"| num_params | {results['num_params']:,} |" in (folder / "report.md").read_text()


def test_the_copy_of_a_run_has_everything(folder, tmp_path):
    back = fetch_run(MIRROR, tmp_path / "back")
    files = lambda folder: {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert files(back) == files(folder)


def test_the_model_of_a_folder_writes_the_text_of_its_report(folder):
    model, tokenizer = load(folder)
    config = json.loads((folder / "config.json").read_text())["config"]
    texts = sample(model, tokenizer, config_from_json(Config, config))
    written = re.findall(r"```text\n(.*?)\n```", (folder / "report.md").read_text(), re.DOTALL)
    assert texts == written
    assert texts[0].startswith("the cat")


def test_an_earlier_checkpoint_can_be_loaded(folder):
    last, tokenizer = load(folder)
    earlier, _ = load(folder, step=48)
    ids = jnp.asarray([tokenizer.encode("the old sailor").ids])
    assert not np.allclose(last(ids), earlier(ids))
    with pytest.raises(
        FileNotFoundError, match="no checkpoint of step 7; available steps: 36, 48, 60"
    ):
        load(folder, step=7)


def test_a_second_run_never_overwrites_the_first(folder, options, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        main([*options, "--out", str(folder)])
    assert stop.value.code == 2
    assert "already contains a run. Choose another folder, or resume" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_resume_with_another_config_names_the_difference(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(folder), "--resume", "--learning-rate", "1e-3"])
    assert stop.value.code == 2
    assert "learning_rate: 0.01 saved, 0.001 given" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over(folder, options, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for file in (copy / "checkpoints" / "step_00000060" / "model").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    metrics = (folder / "metrics.jsonl").read_bytes()
    main(["--out", str(copy), "--resume"])
    assert (copy / "metrics.jsonl").read_bytes() == metrics
    for step in (36, 48, 60):
        (copy / "checkpoints" / f"step_{step:08d}" / "run" / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint"):
        load(copy)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "smok"], "--preset 'smok': did you mean 'smoke'?"),
        (["--prest", "smoke"], "unrecognized option --prest: did you mean --preset"),
        (["--steps", "abc"], "Error parsing --steps: invalid literal"),
        (["--steps", "0"], "Config.steps must be at least 1, got 0"),
        (["--model.num-head", "3"], "--model.num-heads INT"),
        (["--model.num-heads", "5"], "num_heads must divide d_model=224, got 5"),
        (["--model.dtype", "bf16"], "invalid choice 'bf16'"),
        (["--accumulate", "3"], "Config.accumulate must be a divisor of batch_size=16, got 3"),
        (["--mesh.data", "3"], "describes 3 devices, but there are 8"),
        (["--batch-size", "12"], "a global batch of 12 rows cannot be divided over 8 devices"),
        (["--resume"], "set together with --out"),
        (["--corpus", "txt:a.txt"], "Did you mean 'text'?"),
        (["--corpus", "text:/absent/*.txt"], "no file matches '/absent/*.txt'"),
        (["--out", "absent", "--resume"], "absent: does not exist. Run without resume"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, refused, tmp_path):
    assert message in refused(main, [*words, "--cache", str(tmp_path / "cache")])


def test_a_corpus_too_small_for_a_batch(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}" for i in range(40)))
    words = ["--corpus", f"text:{tmp_path}/a.txt", "--cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as stop:
        main(["--preset", "smoke", "--batch-size", "8", *words, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "none of them fell to validation" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_paper_preset_is_gpt2_and_lowers():
    paper = run(PRESETS["paper"])
    assert num_params(paper.model) == num_params(preset("gpt2"))
    ids = jax.ShapeDtypeStruct((512, 1024), "int32")
    batch = dict.fromkeys(("input_ids", "labels", "segment_ids", "positions"), ids)
    assert "512x1024xi32" in paper.lower(batch=batch).as_text()
