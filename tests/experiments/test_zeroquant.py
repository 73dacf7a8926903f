import dataclasses
import json
import string

import numpy as np
import pytest
from flax import nnx

from effscale.data.tokenizer import train_tokenizer
from effscale.experiments.shared import assets
from effscale.experiments.shared.classifier import data as classifier_data
from effscale.experiments.zeroquant import language, report
from effscale.experiments.zeroquant.config import PRESETS, Config
from effscale.experiments.zeroquant.experiment import main
from effscale.interop import save_pretrained
from effscale.models import Transformer, bert, llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models with random weights, and their tokenizers."""
    place = tmp_path_factory.mktemp("zeroquant")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *string.ascii_lowercase]
    words += ["##" + letter for letter in string.ascii_lowercase]
    text = bert(num_layers=2, d_model=16, num_heads=2, vocab_size=60, max_length=64)
    tokenizer = train_tokenizer(["the cat sees a red boat " * 20], vocab_size=270)
    size = tokenizer.get_vocab_size()
    causal = llama(num_layers=3, d_model=16, num_heads=2, d_ff=32, vocab_size=size)
    for name, config in (("bert", text), ("llama", causal)):
        model = Transformer(dataclasses.replace(config, init_std=0.2), rngs=nnx.Rngs(0))
        save_pretrained(model, place / name)
    (place / "bert" / "vocab.txt").write_text("\n".join(words))
    tokenizer.save(str(place / "llama" / "tokenizer.json"))
    return place


@pytest.fixture(scope="module")
def options(folders):
    """Options of a run that takes seconds."""
    return [
        *("--preset", "smoke", "--group-size", "8", "--reviews.train", "64"),
        *("--language-model", str(folders / "llama"), "--text-model", str(folders / "bert")),
    ]


@pytest.fixture(scope="module")
def texts():
    """In place of the assets, which are not everywhere."""

    def reviews(split):
        chance = np.random.default_rng(len(split))
        labels = tuple(int(n) for n in chance.integers(0, 2, 64 if split == "train" else 32))
        texts = tuple(("so so well" if label else "no bad") + " then" * 3 for label in labels)
        return assets.LabelledTexts(texts=texts, labels=labels, names=("bad", "good"))

    pages = tuple("the cat sees a boat " * 20 for _ in range(40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "wikipedia_articles", lambda: pages)
        patch.setattr(assets, "c4_pages", lambda: pages)
        patch.setattr(classifier_data, "drug_reviews", reviews)
        yield patch


@pytest.fixture(scope="module")
def folder(options, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    main([*options, "--out", str(out)])
    return out


def test_a_run_leaves_what_it_promises(folder):
    results = json.loads((folder / "results.json").read_text())
    for arm in ("float32", "w8a8", "w4a8", "w4a8_lkd", "w4_gptq"):
        losses = json.loads((folder / "smollm2" / arm / "losses.json").read_text())
        assert len(losses["wiki"]) == len(losses["python"]) == 2
        assert results[f"smollm2_{arm}_perplexity"] == pytest.approx(
            np.exp(np.mean(losses["wiki"]))
        )
        found = json.loads((folder / "minilm" / "seed-0" / "accuracies.json").read_text())
        assert results[f"minilm_{arm}_accuracy"] == found[arm]["accuracy"]
    assert results["smollm2_float32_loss_change"] == 0
    assert 0 < abs(results["smollm2_w8a8_loss_change"]) < abs(results["smollm2_w4a8_loss_change"])
    # 8 bits are a quarter, 4 bits less; scales take their part in a model so small.
    sizes = [results[f"smollm2_{arm}_layers_mb"] for arm in ("float32", "w8a8", "w4a8")]
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * 0.8 * sizes[2]
    sensitivity = json.loads((folder / "smollm2" / "sensitivity" / "losses.json").read_text())
    assert list(sensitivity["w8a8_layer"]) == ["layers.0", "layers.1"]
    worst = max(sensitivity["w4a8_layer"].values())
    assert results["smollm2_w4a8_layer_worst_loss_change"] == worst
    assert sensitivity["w4a8_layer"][f"layers.{results['smollm2_w4a8_layer_worst']}"] == worst
    assert set(sensitivity["w4a8_kind"]) == {
        *(f"attention.{name}.kernel" for name in ("query", "key", "value", "out")),
        *(f"feed_forward.{name}.kernel" for name in ("gate", "up", "down")),
    }
    for name in ("perplexity", "sensitivity"):
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_there_is_not_made_again(folder, options, texts, monkeypatch):
    def fail(*_):
        pytest.fail("measured again")

    before = json.loads((folder / "results.json").read_text())
    monkeypatch.setattr(language, "row_losses", fail)
    main([*options, "--arms", "w8a8", "w4a8", "--out", str(folder), "--resume"])
    after = json.loads((folder / "results.json").read_text())
    assert after["smollm2_w8a8_perplexity"] == before["smollm2_w8a8_perplexity"]
    assert "smollm2_w4_gptq_perplexity" not in after


def test_rows_come_from_several_documents():
    documents = [[n] * 1000 for n in range(12)]
    rows = language._rows(documents, 8, 16)
    assert rows.shape == (8, 16)
    assert np.unique(rows).tolist() == list(range(8))
    with pytest.raises(ValueError, match="64 tokens, too few for 8 rows of 16"):
        language._rows([[1] * 1000] * 4, 8, 16)


def test_differences_are_of_pairs():
    change, error = report.difference([1.0, 2.0, 4.0], [0.9, 1.9, 3.9])
    assert change == pytest.approx(0.1)
    assert error == pytest.approx(0.0, abs=1e-12)
    assert report.perplexity([0.0, 2.0]) == pytest.approx(np.e)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--group-size", "7"], "layers.0.feed_forward"),
        (["--length", "1"], "Config.length must be at least 2 (a token and the next one), got 1"),
        (["--rows", "3"], "Config.rows must be a multiple of batch_rows=2, got 3"),
        (["--arms", "w8a8", "w8a8"], "must be different arms"),
        (["--models", "smollm2", "smollm2"], "must be different models"),
        (["--layers", "0"], "Config.layers must be at least 1, got 0"),
        (["--max-length", "65"], "max_length must be at most the model's 64, got 65"),
    ],
)
def test_wrong_options_become_a_message(options, texts, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main([*options, *words, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    # tyro breaks lines in a box.
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_models_of_the_wrong_kind(folders, options, texts, tmp_path, capsys):
    for words, message in (
        (
            ["--language-model", str(folders / "bert")],
            "language_model must be a causal language model",
        ),
        (["--text-model", str(folders / "llama")], "text_model must be a BERT"),
    ):
        with pytest.raises(SystemExit):
            main([*options, *words, "--out", str(tmp_path / "run")])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_presets_are_configs_of_their_own():
    assert PRESETS["default"] == Config()
    assert PRESETS["paper"].lkd.learning_rate == 5e-6
