"""What goes beside the weights, what is refused before anything is written, kills, several processes."""

import json
import pathlib
import sys

import pytest
from flax import nnx
from safetensors.numpy import load_file

from effscale.data import train_tokenizer
from effscale.interop import FolderError, load_pretrained, load_tokenizer, save_pretrained
from effscale.models import ClassHead, Transformer, bert, gpt2, llama
from tests.parallel.local_launch import launch_local

SCRIPT = pathlib.Path(__file__).with_name("two_processes_save.py")
TOKENIZER = train_tokenizer(["some text to learn from"] * 3, vocab_size=262)
TINY = {"num_layers": 2, "d_model": 16, "num_heads": 2}


def make(num_heads=2, vocab_size=262):
    config = llama(**TINY | {"num_heads": num_heads}, d_ff=24, vocab_size=vocab_size)
    return Transformer(config, rngs=nnx.Rngs(0))


def fields(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def change(folder, **values):
    (folder / "config.json").write_text(json.dumps(fields(folder) | values))


@pytest.fixture
def folder(tmp_path):
    save_pretrained(make(), tmp_path / "model", tokenizer=TOKENIZER)
    return tmp_path / "model"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_a_tokenizer_of_ours_tells_the_end(folder):
    assert fields(folder)["eos_token_id"] == TOKENIZER.token_to_id("<|endoftext|>")
    assert fields(folder, "tokenizer_config.json")["eos_token"] == "<|endoftext|>"


def test_a_tokenizer_without_a_usual_end_goes_along(out):
    tokenizer = train_tokenizer(["text"] * 3, vocab_size=258, special_tokens=["<x>"])
    save_pretrained(make(), out, tokenizer=tokenizer)
    assert fields(out)["eos_token_id"] is None
    assert "eos_token" not in fields(out, "tokenizer_config.json")
    assert load_tokenizer(out).get_vocab() == tokenizer.get_vocab()


def test_like_brings_what_the_model_does_not_tell(folder, out):
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "top_k": 7}')
    change(folder, eos_token_id=[0, 5], quantization_config=None, custom="kept", rope_theta=3.0)
    save_pretrained(make(), out, like=folder)
    saved = fields(out)
    assert saved["eos_token_id"] == [0, 5]
    assert saved["custom"] == "kept"
    assert "rope_theta" not in saved
    assert fields(out, "generation_config.json")["top_k"] == 7
    assert load_tokenizer(out).get_vocab() == TOKENIZER.get_vocab()


def test_another_tokenizer_leaves_nothing_of_the_first(folder, out):
    for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 99, "top_k": 7}')
    change(folder, eos_token_id=99, pad_token_id=98)
    other = train_tokenizer(["another text"] * 3, vocab_size=258, special_tokens=["</s>"])
    for place in (out, folder):  # somewhere else, and where the first one is
        save_pretrained(make(), place, like=folder, tokenizer=other)
        assert {p.name for p in place.iterdir()} == {
            "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        }  # fmt: skip
        assert fields(place)["eos_token_id"] == other.token_to_id("</s>")
        assert fields(place)["pad_token_id"] is None
        assert fields(place, "generation_config.json")["eos_token_id"] == other.token_to_id("</s>")


def test_like_a_folder_of_another_family(folder, out):
    save_pretrained(Transformer(gpt2(**TINY, vocab_size=262), rngs=nnx.Rngs(0)), out, like=folder)
    assert "hidden_size" not in fields(out)
    assert fields(out)["eos_token_id"] == fields(folder)["eos_token_id"]
    assert load_pretrained(out).config.d_model == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": TOKENIZER}, "ids up to 261"),
        (
            {"max_shard_size": "lots"},
            r"max_shard_size must be at least one byte, as a number or with a unit like '5GB', '500MB' or '1GiB', got 'lots'\.",
        ),
        ({"dtype": "int8"}, "int8"),
        ({"like": "nowhere"}, "nowhere"),
    ],
)
def test_nothing_is_written_where_something_is_wrong(settings, message, out):
    with pytest.raises(ValueError, match=message):
        save_pretrained(make(vocab_size=100), out, **settings)
    assert not out.exists()


def test_a_head_that_takes_another_vector_is_refused(out):
    config = bert(**TINY, vocab_size=20, heads=(ClassHead(num_classes=3, pool="mean"),))
    with pytest.raises(
        ValueError,
        match="transformers has no family with this config: the head 'classes' must have pool='pooled', as in transformers, got 'mean'",
    ):
        save_pretrained(Transformer(config, rngs=nnx.Rngs(0)), out)


@pytest.mark.parametrize("when", ["moved", "config"])
def test_a_kill_leaves_no_config_of_another_model(folder, monkeypatch, when):
    """Between weights and config the folder is no model: a config of 4 heads over weights of 2 would be silent garbage."""
    from effscale.interop import companions, save

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    if when == "moved":
        monkeypatch.setattr(companions.Companions, "write", stop)
    else:
        monkeypatch.setattr(companions, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        save.save_pretrained(make(num_heads=4), folder)
    with pytest.raises(FolderError, match=r"no config\.json"):
        load_pretrained(folder)


def test_two_processes_save_one_folder(folder, out):
    results = launch_local(
        [sys.executable, str(SCRIPT), str(folder), str(out)], num_processes=2, timeout=240
    )
    assert len(results) == 2
    before = load_file(folder / "model.safetensors")
    after = {name: x for file in out.glob("*.safetensors") for name, x in load_file(file).items()}
    assert {n: x.tobytes() for n, x in before.items()} == {n: x.tobytes() for n, x in after.items()}
    assert load_pretrained(out).config == load_pretrained(folder).config


def test_sources_that_are_refused(folder):
    change(folder, num_hidden_layers=50_000)
    with pytest.raises(
        FolderError,
        match=r"config\.json: num_hidden_layers must be at most the number of tensors, 21, got 50000",
    ):
        load_pretrained(folder)
    change(folder, num_hidden_layers=2, quantization_config={"quant_method": "gptq"})
    with pytest.raises(FolderError, match=r"quantized \('gptq'\)"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    (folder / "a.gguf").touch()
    (folder / "b.gguf").touch()
    with pytest.raises(FolderError, match=r"Pass one of them, such as 'a\.gguf'"):
        load_pretrained(folder)


def test_tokenizers_from_a_vocabulary_and_merges(folder, tmp_path):
    TOKENIZER.model.save(str(tmp_path))
    end = TOKENIZER.token_to_id("<|endoftext|>")
    text = TOKENIZER.encode("some text").ids
    assert load_tokenizer(tmp_path).encode("some text").ids == text
    settings = {"add_bos_token": True, "bos_token": {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "added_tokens.json").write_text('{"<|x|>": 262}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("some text").ids == [end, *text]
    assert tokenizer.encode("<|x|>").ids == [end, 262]
    (tmp_path / "added_tokens.json").write_text('{"<|x|>": 300}')
    with pytest.raises(FolderError, match="the id 300"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(FolderError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_like_tells_which_of_two_families_that_are_the_same(out, tmp_path):
    """A Mistral without windows computes what a Llama of these weights does."""
    save_pretrained(make(), tmp_path / "llama")
    assert fields(tmp_path / "llama")["model_type"] == "llama"
    change(tmp_path / "llama", model_type="mistral", sliding_window=None, custom="kept")
    change(tmp_path / "llama", architectures=["MistralForCausalLM"])
    model = load_pretrained(tmp_path / "llama")
    save_pretrained(model, out, like=tmp_path / "llama")
    saved = fields(out)
    assert (saved["model_type"], saved["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert saved["sliding_window"] is None
    assert saved["custom"] == "kept"
    assert load_pretrained(out).config == model.config
    windows = llama(**TINY, d_ff=24, vocab_size=262, window=4)
    save_pretrained(Transformer(windows, rngs=nnx.Rngs(0)), out)
    assert (fields(out)["model_type"], fields(out)["sliding_window"]) == ("mistral", 4)


def test_a_folder_that_names_only_a_class_goes_back_as_its_family(folder, tmp_path):
    """A Mistral without windows is also a Llama."""
    old = fields(folder) | {"architectures": ["MistralForCausalLM"], "sliding_window": None}
    (folder / "config.json").write_text(json.dumps({k: old[k] for k in old if k != "model_type"}))
    save_pretrained(load_pretrained(folder), tmp_path / "out", like=folder)
    assert fields(tmp_path / "out")["model_type"] == "mistral"
