"""The same model under all the names that its tensors have had."""

import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from effscale.interop import FolderError, load_pretrained, save_pretrained
from effscale.models import ClassHead, LMHead
from tests.interop.files import (
    bits_of,
    bytes_of,
    model_of_bits,
    model_of_numbers,
    read_folder,
    write_folder,
)
from tests.interop.spaces import CLASSES, DECODERS, ENCODERS, RELATIVES, example

# Llama's relatives have its names, and those with experts two kinds of names of these.
NAMED = {n: c for n, c in DECODERS.items() if n not in RELATIVES or n in ("mixtral", "qwen3_moe")}
WITH_HEAD = NAMED | {"bert": ("BertForPreTraining",), "vit": ("ViTForImageClassification",)}
LANGUAGE = {name: classes[0] for name, classes in NAMED.items()}
TIED = LANGUAGE | {"bert": "BertForPreTraining"}


@pytest.fixture
def hf():
    pytest.importorskip("torch", reason="these tests write files with PyTorch")
    return pytest.importorskip("transformers", reason="the names in memory are transformers'")


def original(case, folder: pathlib.Path):
    """A model, its tensors in a file, and its config.json."""
    model = model_of_numbers(case.config)
    save_pretrained(model, folder / "original")
    return load_pretrained(folder / "original"), read_folder(folder / "original"), case.json


def load(folder: pathlib.Path, tensors, fields):
    return load_pretrained(write_folder(folder / "variant", tensors, fields))


@pytest.mark.parametrize("start", ["", "module."])
@pytest.mark.parametrize("model_type", WITH_HEAD)
def test_without_the_prefix(model_type, start, tmp_path):
    case = example(model_type, WITH_HEAD[model_type][0])
    model, tensors, fields = original(case, tmp_path)
    prefix = case.family.prefix
    assert any(name.startswith(prefix) for name in tensors)
    bare = {start + name.removeprefix(prefix): array for name, array in tensors.items()}
    assert bits_of(load(tmp_path, bare, fields)) == bits_of(model)


@pytest.mark.parametrize("model_type", WITH_HEAD)
def test_with_the_prefix_in_a_trunk(model_type, tmp_path):
    case = example(model_type, {**DECODERS, **ENCODERS}[model_type][model_type in DECODERS])
    assert case.architecture.endswith("Model")
    model, tensors, fields = original(case, tmp_path)
    prefixed = {case.family.prefix + name: array for name, array in tensors.items()}
    assert bits_of(load(tmp_path, prefixed, fields)) == bits_of(model)


def test_a_tensor_under_two_of_its_names(tmp_path):
    _, tensors, fields = original(example("gpt2", "GPT2Model"), tmp_path)
    with pytest.raises(FolderError, match=r"'wte.weight' and 'transformer.wte.weight' would both"):
        load(tmp_path, tensors | {"transformer.wte.weight": tensors["wte.weight"]}, fields)


def repeats(case, tensors):
    """The names that tied tensors have besides, with the tensors, and the name that each repeats."""
    prefix = case.family.prefix
    pairs = case.family.tied.items()
    whole = {again: name if name.startswith("cls.") else prefix + name for again, name in pairs}
    return {again: tensors[name] for again, name in whole.items()}, whole


@pytest.mark.parametrize("model_type", TIED)
def test_tied_tensors_that_are_there_twice(model_type, tmp_path):
    case = example(model_type, TIED[model_type], tie_word_embeddings=True)
    model, tensors, fields = original(case, tmp_path)
    again, _ = repeats(case, tensors)
    assert again
    assert not again.keys() & tensors.keys()
    assert bits_of(load(tmp_path, tensors | again, fields)) == bits_of(model)


@pytest.mark.parametrize("model_type", TIED)
def test_tied_tensors_that_are_there_under_their_second_name_only(model_type, tmp_path):
    case = example(model_type, TIED[model_type], tie_word_embeddings=True)
    model, tensors, fields = original(case, tmp_path)
    again, names = repeats(case, tensors)
    others = {name: array for name, array in tensors.items() if name not in names.values()}
    assert bits_of(load(tmp_path, others | again, fields)) == bits_of(model)


@pytest.mark.parametrize("model_type", TIED)
def test_tied_weights_that_differ_are_both_loaded(model_type, tmp_path):
    case = example(model_type, TIED[model_type], tie_word_embeddings=True)
    _, tensors, fields = original(case, tmp_path)
    again, _ = repeats(case, tensors)
    name = next(iter(again))
    tensors = tensors | {name: again[name] + 1}
    with pytest.warns(UserWarning, match=f"ties {name} to .*, but their values differ: both"):
        model = load(tmp_path, tensors, fields)
    assert [head.tied for head in model.config.heads if isinstance(head, LMHead)] == [False]
    save_pretrained(model, tmp_path / "out")
    written = read_folder(tmp_path / "out")
    assert bytes_of({name: written[name] for name in tensors}) == bytes_of(tensors)
    assert bits_of(load_pretrained(tmp_path / "out")) == bits_of(model)  # and without a warning


@pytest.mark.parametrize("tied", [True, False])
def test_berts_bias_has_two_names_and_the_decoder_s_counts(tied, tmp_path):
    case = example("bert", "BertForMaskedLM", tie_word_embeddings=tied)
    _, tensors, fields = original(case, tmp_path)
    decoders = tensors["cls.predictions.bias"] + 1
    with pytest.warns(
        UserWarning, match="decoder.bias and cls.predictions.bias should be the same"
    ):
        model = load(tmp_path, tensors | {"cls.predictions.decoder.bias": decoders}, fields)
    np.testing.assert_array_equal(model.heads["mlm"].bias.get_value(), decoders)


def test_berts_of_tensorflow(tmp_path):
    model, tensors, fields = original(example("bert", "BertForPreTraining"), tmp_path)
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in tensors.items()
    }  # fmt: skip
    assert sum(name.endswith((".gamma", ".beta")) for name in older) == 2 * (1 + 2 * 2 + 1)
    assert bits_of(load(tmp_path, older, fields)) == bits_of(model)


MASK = np.tril(np.ones((1, 1, 32, 32)))
SMALLEST = np.array(-1e9, np.float32)
BUFFERS = {
    "gpt2": {"h.{}.attn.bias": MASK.astype(np.uint8), "h.{}.attn.masked_bias": SMALLEST},
    "gptj": {"h.{}.attn.bias": MASK.astype(bool), "h.{}.attn.masked_bias": SMALLEST},
    "gpt_neox": {
        "layers.{}.attention.bias": MASK.astype(bool),
        "layers.{}.attention.masked_bias": SMALLEST,
        "layers.{}.attention.rotary_emb.inv_freq": np.ones(4, np.float32),
    },
    "llama": {"layers.{}.self_attn.rotary_emb.inv_freq": np.ones(2, ml_dtypes.bfloat16)},
    "bert": {"embeddings.position_ids": np.arange(32)[None]},
    "vit": {"embeddings.mask_token": np.zeros((1, 1, 8), np.float32)},
}


@pytest.mark.parametrize("model_type", BUFFERS)
def test_buffers_are_not_weights(model_type, tmp_path):
    case = example(model_type, WITH_HEAD[model_type][0])
    model, tensors, fields = original(case, tmp_path)
    buffers = {
        case.family.prefix + name.format(layer): array
        for name, array in BUFFERS[model_type].items()
        for layer in range(2)
    }
    assert bits_of(load(tmp_path, tensors | buffers, fields)) == bits_of(model)
    bare = {name.removeprefix(case.family.prefix): a for name, a in (tensors | buffers).items()}
    assert bits_of(load(tmp_path, bare, fields)) == bits_of(model)


def test_a_name_like_a_buffer_s_is_a_weight_elsewhere(tmp_path):
    # GPT-2's mask is `attn.bias`, and the biases of its projections are `attn.c_attn.bias`.
    _, tensors, fields = original(example("gpt2", "GPT2LMHeadModel"), tmp_path)
    del tensors["transformer.h.1.attn.c_attn.bias"]
    with pytest.raises(FolderError, match=r"missing: h\.1\.attn\.c_attn\.bias \[24\]"):
        load(tmp_path, tensors, fields)


@pytest.mark.parametrize(
    "start",
    ["rwtransformer.", "rwtranrsformer.", "module.rwtransformer.", "module.rwtranrsformer."],
)
@pytest.mark.parametrize("model_type", NAMED)
def test_reward_models_of_deepspeed_chat(model_type, start, tmp_path):
    case = example(model_type, DECODERS[model_type][1])
    trunk, tensors, _ = original(case, tmp_path)
    width = trunk.config.hidden_width
    value = np.random.default_rng(2).normal(size=(1, width)).astype(np.float32)
    # They keep the base model's config.json, which names a class with a next-token head.
    fields = case.json | {"architectures": [LANGUAGE[model_type]]}
    head = {f"{start.partition('rw')[0]}v_head.weight": value}
    reward = load(tmp_path, {start + n: a for n, a in tensors.items()} | head, fields)
    assert reward.config.heads == (ClassHead(name="value", num_classes=1, pool="none", bias=False),)
    np.testing.assert_array_equal(reward.heads["value"].dense.kernel.get_value(), value.T)
    rest = {name: bits for name, bits in bits_of(reward).items() if "heads" not in name}
    assert rest == bits_of(trunk)
    # In transformers it is a classifier of one class, on each text's last token.
    save_pretrained(reward, tmp_path / "out")
    written = read_folder(tmp_path / "out")
    np.testing.assert_array_equal(written["score.weight"], value)
    classifier = load_pretrained(tmp_path / "out")
    assert [(head.name, head.pool) for head in classifier.config.heads] == [("classes", "last")]
    assert list(bits_of(classifier).values()) == list(bits_of(reward).values())


def test_a_reward_is_transformers_score_of_the_last_token(hf, tmp_path):
    """Of an embedding of another width, as OPT-350M has it: after the projection out."""
    import torch

    from tests.interop.torch_models import batch, torch_model

    fields = {"word_embed_proj_dim": 5, "do_layer_norm_before": False, "pad_token_id": 1}
    case = example("opt", "OPTModel", **fields)
    torch_model(case).save_pretrained(tmp_path / "trunk")
    tensors = {f"rwtransformer.{n}": a for n, a in read_folder(tmp_path / "trunk").items()}
    tensors["v_head.weight"] = np.random.default_rng(2).normal(size=(1, 5)).astype(np.float32)
    reward = load(tmp_path, tensors, case.json | {"architectures": ["OPTForCausalLM"]})
    save_pretrained(reward, tmp_path / "out", like=tmp_path / "trunk")
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    for side, last in (("left", [8, 8, 8]), ("right", [8, 5, 2])):
        arrays = batch(case, side)
        values = reward(jnp.asarray(arrays["ids"]), attention_mask=jnp.asarray(arrays["mask"]))
        ids, mask = (torch.tensor(arrays[name]) for name in ("ids", "mask"))
        with torch.no_grad():
            scores = theirs(input_ids=ids.long(), attention_mask=mask).logits
        found = np.asarray(values["value"])[np.arange(3), last]
        np.testing.assert_allclose(found, scores, atol=1e-5)


def test_a_bert_of_a_class_without_a_pooler_may_have_one(tmp_path):
    """Files of before transformers 4 have it whatever the class."""
    case = example("bert", "BertForTokenClassification")
    model, tensors, fields = original(case, tmp_path)
    pooler = {
        "bert.pooler.dense.weight": np.ones((8, 8), np.float32),
        "bert.pooler.dense.bias": np.ones(8, np.float32),
    }
    old = load(tmp_path, tensors | pooler, fields)
    assert old.config.heads == model.config.heads
    assert old.config.pooler


@pytest.mark.parametrize(("model_type", "architecture"), CLASSES)
def test_names_in_memory(model_type, architecture, hf, tmp_path):
    import safetensors.torch

    from tests.interop.torch_models import torch_model

    theirs = torch_model(example(model_type, architecture))
    theirs.save_pretrained(tmp_path / "files")
    expected = load_pretrained(tmp_path / "files")
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "files" / "model.safetensors")
    assert bits_of(load_pretrained(tmp_path / "files")) == bits_of(expected)


@pytest.mark.parametrize("model_type", WITH_HEAD)
@pytest.mark.parametrize("shards", [1, 2])
def test_files_of_torch(model_type, shards, hf, tmp_path):
    """Tied tensors are one storage under two names there."""
    import json

    import torch

    from tests.interop.torch_models import torch_model

    theirs = torch_model(example(model_type, WITH_HEAD[model_type][0])).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "files")
    expected = load_pretrained(tmp_path / "files")
    (tmp_path / "files" / "model.safetensors").unlink()
    state = theirs.state_dict()
    if shards == 1:
        torch.save(state, tmp_path / "files" / "pytorch_model.bin")
    else:
        parts = {name: f"pytorch_model-{1 + i % 2:05}-of-00002.bin" for i, name in enumerate(state)}
        for file in set(parts.values()):
            part = {name: state[name] for name in state if parts[name] == file}
            torch.save(part, tmp_path / "files" / file)
        index = json.dumps({"metadata": {}, "weight_map": parts})
        (tmp_path / "files" / "pytorch_model.bin.index.json").write_text(index)
    assert bits_of(load_pretrained(tmp_path / "files")) == bits_of(expected)


@pytest.mark.filterwarnings("ignore:.*contains NaN:UserWarning")
def test_random_bits_under_bare_names(tmp_path):
    case = example("opt", "OPTForCausalLM", word_embed_proj_dim=5, do_layer_norm_before=False)
    model = model_of_bits(case.config, "float16")
    save_pretrained(model, tmp_path / "original")
    tensors = {n.removeprefix("model."): a for n, a in read_folder(tmp_path / "original").items()}
    assert all(name.startswith("decoder.") for name in tensors)
    assert bits_of(load(tmp_path, tensors, case.json)) == bits_of(model)
