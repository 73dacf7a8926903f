"""Whole modules in adapters' files, without PEFT: what is written, what comes back, what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import PartitionSpec

from effscale.interop import FolderError, load_adapter, save_adapter
from effscale.interop.plan import parameters
from effscale.models import ClassHead, abstract_model, add_lora, gpt2, llama, map_weights
from effscale.parallel import MeshConfig, shard

SIZE = {"num_layers": 3, "d_model": 16, "num_heads": 4, "vocab_size": 24}
SCORE = ClassHead(name="score", num_classes=1, pool="last", bias=False)
CLASSES = ClassHead(name="token_classes", num_classes=8, pool="none")
TINY = llama(**SIZE, num_kv_heads=2, d_ff=24)
START = "base_model.model"


def build(*heads, config=TINY, seed=0, where=r"query\.kernel"):
    """A model of random numbers, and with pairs, by default beside each query's kernel, all of it other numbers."""
    random = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype)
    base = jax.tree.map(
        draw, abstract_model(dataclasses.replace(config, heads=heads or config.heads))
    )
    adapted = add_lora(base, rank=2, key=jax.random.key(seed), where=where)
    return base, jax.tree.map(lambda leaf: leaf + 0.1, adapted)


def change(folder, tensors=(), **fields):
    """Changes an adapter: tensors (None takes one away), and fields of its config."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    every = safetensors.numpy.load_file(file) | dict(tensors)
    safetensors.numpy.save_file({n: a for n, a in every.items() if a is not None}, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


@pytest.fixture
def adapter(tmp_path):
    """A base whose own head is another one, and the folder of an adapter that brings a classifier of tokens."""
    save_adapter(build(CLASSES)[1], tmp_path)
    return build(CLASSES, seed=1)[0], tmp_path


def test_the_head_goes_along_by_itself(adapter):
    """Each number as it was; one that predicts the next token is not written whole."""
    base, folder = adapter
    before, after = build(CLASSES)[1], load_adapter(base, folder)
    for name in ("kernel", "bias"):
        one, other = (
            getattr(model.heads["token_classes"].dense, name) for model in (before, after)
        )
        assert np.asarray(one.get_value()).tobytes() == np.asarray(other.get_value()).tobytes()
    save_adapter(build()[1], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)


def test_a_critic_and_a_reward_are_one_file(tmp_path):
    value = dataclasses.replace(SCORE, name="value", pool="none")
    save_adapter(build(SCORE)[1], tmp_path / "score")
    save_adapter(build(value)[1], tmp_path / "value")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "score" / file).read_bytes() == (tmp_path / "value" / file).read_bytes()
    critic = load_adapter(build(value, seed=1)[0], tmp_path / "score")
    wanted = build(SCORE)[1].heads["score"].dense.kernel.get_value()
    np.testing.assert_array_equal(critic.heads["value"].dense.kernel.get_value(), wanted)


def test_types_and_places(adapter):
    """A head of float32 beside weights of 16 bits stays one; a stack of both types becomes float32."""
    base, folder = adapter
    norm = f"{START}.model.layers.1.input_layernorm.weight"
    change(
        folder,
        {norm: np.full(16, 1 / 3, np.float32)},
        modules_to_save=["score", "1.input_layernorm"],
    )
    narrow = map_weights(base, lambda w: w.astype(jnp.bfloat16), "")
    mesh = MeshConfig(data=2, fsdp=4).build()
    after = load_adapter(shard(narrow, mesh), folder)
    kernel = after.heads["token_classes"].dense.kernel.get_value()
    assert (kernel.dtype, kernel.sharding.spec) == (jnp.float32, PartitionSpec("fsdp", None))
    path = "groups.0.blocks.0.attention_norm.scale"
    scale, old = (parameters(model)[path].get_value() for model in (after, narrow))
    assert scale.dtype == jnp.float32
    np.testing.assert_array_equal(scale[1], np.float32(1 / 3))
    np.testing.assert_array_equal(scale[::2], old[::2].astype(jnp.float32))


REFUSED = {
    "a part is missing": ({f"{START}.score.bias": None}, {}, rf"\n  missing: {START}\.score\.bias$"),
    "all of it is missing": (
        {f"{START}.score.bias": None, f"{START}.score.weight": None}, {}, r"missing: .*score\.weight\n  missing: .*score\.bias$"),
    "another number of classes": (
        {f"{START}.score.weight": np.ones((5, 16), np.float32)}, {}, r"wrong shape: base_model\.model\.score\.weight \[5, 16\], but the model needs \[8, 16\]$"),
    "whole numbers": ({f"{START}.score.bias": np.ones(8, np.int32)}, {}, r"not of a float type: base_model\.model\.score\.bias int32$"),
    "not named": ({f"{START}.model.norm.weight": np.ones(16, np.float32)}, {}, r"norm\.weight: a whole trained weight that modules_to_save does not name"),
    "no such module": (
        {f"{START}.extra.weight": np.ones(3, np.float32)}, {"modules_to_save": ["score", "extra"]}, r"extra\.weight: the model has no such module$"),
    "beside a pair": (
        {f"{START}.model.layers.0.self_attn.q_proj.weight": np.ones((16, 16), np.float32)},
        {"modules_to_save": ["score", "layers.0.self_attn.q_proj"]}, r"base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.weight: a whole weight, in addition to a pair of the same$"),
    "no list": ({}, {"modules_to_save": "score"}, r"adapter_config\.json: modules_to_save must be a list of strings, got 'score'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_refused(case, adapter):
    tensors, fields, message = REFUSED[case]
    base, folder = adapter
    change(folder, tensors, **fields)
    with pytest.raises(FolderError, match=message):
        load_adapter(base, folder)


def test_modules_that_cannot_be_saved(tmp_path):
    model = build()[1]
    for names, message in (
        ("score", r"modules_to_save must be a tuple of names, such as \('score',\), got 'score'"),
        (("lm_head", "score"), r"modules_to_save must name modules, .* end in .*lm_head.*, got \['score'\]"),
        (("norm", "q_proj"), r"layers\.0\.self_attn\.q_proj\.weight has a pair; merge it with merge_lora, or remove it"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            save_adapter(model, tmp_path / "none", modules_to_save=names)
    assert not (tmp_path / "none").exists()


def test_a_model_that_is_adapted_takes_no_whole_weight_there(adapter):
    """Neither a pair nor a packed weight is silently thrown away."""
    base, folder = adapter
    change(folder, {f"{START}.model.layers.{i}.self_attn.v_proj.weight": np.ones((8, 16), np.float32) for i in range(3)},
           modules_to_save=["score", "v_proj"])  # fmt: skip
    adapted = add_lora(base, rank=1, key=jax.random.key(0), where=r"value\.kernel")
    with pytest.raises(
        FolderError,
        match=r"groups\.0\.blocks\.0\.attention\.value\.kernel of the model is a LoRA, which a whole weight cannot replace",
    ):
        load_adapter(adapted, folder)


def test_a_fused_module(tmp_path):
    """Query, key and value are one module in GPT-2, and one layer of each of our stacks is replaced."""
    base, adapted = build(config=gpt2(**SIZE, max_length=12), where=r"up\.kernel")
    save_adapter(adapted, tmp_path, modules_to_save=("h.2.attn",))
    after = load_adapter(base, tmp_path)
    for name in ("query", "key", "value", "out"):
        one, old, new = (
            np.asarray(getattr(m.groups[0].blocks[0].attention, name).kernel.get_value())
            for m in (adapted, base, after)
        )
        np.testing.assert_array_equal(new[2], one[2])
        np.testing.assert_array_equal(new[:2], old[:2])
