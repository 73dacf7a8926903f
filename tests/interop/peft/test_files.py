"""LoRA adapters' files, without PEFT: what is written, what comes back, what is refused."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from effscale.interop import FolderError, load_adapter, save_adapter
from effscale.interop.families import FAMILIES
from effscale.interop.peft.config import read_scaling, targets, write_scaling
from effscale.models import (
    ClassHead,
    LoRA,
    abstract_model,
    add_lora,
    bert,
    bert_pretraining_heads,
    bloom,
    gpt2,
    gptj,
    llama,
    map_weights,
    neox,
    opt,
    unmerge_lora,
    unroll,
    vit,
)
from effscale.models.weights import dense
from effscale.parallel import MeshConfig, shard

SIZE = {"num_layers": 3, "d_model": 16, "num_heads": 4}
TEXT = SIZE | {"vocab_size": 24}
TINY = {
    "gpt2": gpt2(**TEXT, max_length=12),
    "opt": opt(**TEXT, max_length=12, d_embed=8, post_norm=True),
    "bloom": bloom(**TEXT),
    "gptj": gptj(**TEXT, rotary_dim=4),
    "neox": neox(**TEXT, rotary_fraction=1.0),
    "llama": llama(**TEXT, num_kv_heads=2, d_ff=24),
    "bert": bert(**TEXT, max_length=12, heads=bert_pretraining_heads()),
    "vit": vit(**SIZE, image_size=8, patch_size=4, num_classes=5),
}


def random_leaves(tree, seed=0):
    random = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype)
    return jax.tree.map(draw, tree)


def build(name):
    """A model of random numbers."""
    config = TINY[name] if isinstance(name, str) else name
    return random_leaves(abstract_model(config))


def adapted(model, where=r"(kernel|tokens\.embedding)$", rank=2, **options):
    """The model with pairs of random numbers."""
    model = add_lora(model, **{"rank": rank, "key": jax.random.key(0), "where": where} | options)
    random = lambda w: LoRA(w.base, *random_leaves((w.a, w.b), 1), w.scale)
    return map_weights(model, lambda w: random(w) if isinstance(w, LoRA) else w, lambda path: True)


def weights(model):
    found = {}
    map_weights(model, lambda w: w, lambda path: found.setdefault(path, None) is None)
    values = []
    map_weights(model, lambda w: values.append(w) or w, lambda path: True)
    return dict(zip(found, values, strict=True))


def tensors_in(folder):
    return safetensors.numpy.load_file(pathlib.Path(folder) / "adapter_model.safetensors")


def config_in(folder):
    return json.loads((pathlib.Path(folder) / "adapter_config.json").read_text())


def rewrite(folder, *, tensors=None, **fields):
    """Changes an adapter."""
    if tensors is not None:
        safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config_in(folder) | fields))


@pytest.mark.parametrize("name", TINY)
def test_there_and_back(name, tmp_path):
    """Every weight is what it was; a second way back and forth changes no bit."""
    model = build(name)
    before = adapted(model, alpha=3.0)
    save_adapter(before, tmp_path / "once")
    after = load_adapter(model, tmp_path / "once")
    for path, weight in weights(before).items():
        np.testing.assert_allclose(dense(weights(after)[path]), dense(weight), atol=1e-5)
    save_adapter(after, tmp_path / "twice")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()
    for path, weight in weights(unmerge_lora(after)).items():
        assert np.asarray(weight).tobytes() == np.asarray(weights(model)[path]).tobytes()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_layers_that_are_not_stacked(name, tmp_path):
    """The same file, and it goes back to either form."""
    model = build(name)
    before = adapted(model)
    save_adapter(before, tmp_path / "stacked")
    save_adapter(unroll(before), tmp_path / "apart")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "stacked" / file).read_bytes() == (
            tmp_path / "apart" / file
        ).read_bytes()
    one = load_adapter(unroll(model), tmp_path / "stacked")
    other = unroll(load_adapter(model, tmp_path / "apart"))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_on_a_mesh(tmp_path):
    """A pair lies where its weight lies: its wide side is divided like that side of the weight."""
    model = build("llama")
    save_adapter(adapted(model), tmp_path / "one")
    mesh = MeshConfig(data=1, fsdp=2, tensor=4).build()
    after = load_adapter(shard(model, mesh), tmp_path / "one")
    up = after.groups[0].blocks[0].feed_forward.up.kernel.get_value()
    assert up.base.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert up.a.sharding.spec == PartitionSpec(None, "fsdp", None)
    assert up.b.sharding.spec == PartitionSpec(None, None, "tensor")
    assert up.b.addressable_shards[0].data.shape == (3, 2, 24 // 4)
    save_adapter(after, tmp_path / "eight")
    assert {name: a.tobytes() for name, a in tensors_in(tmp_path / "one").items()} == {
        name: a.tobytes() for name, a in tensors_in(tmp_path / "eight").items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_names_in_memory_lead_back_to_those_in_files(family):
    family = FAMILIES[family]
    changed = 0
    for rule in family.rules:
        for prefix in ("", family.prefix) if rule in family.trunk else ("",):
            stored = rule.theirs.format(11, 3)
            name = family.memory_name(prefix + stored)
            assert family.canonical(name) == stored
            changed += name != prefix + stored
    assert (changed > 0) == (family.model_type in ("vit", "gpt_neox", "mixtral"))


@pytest.mark.parametrize(
    ("name", "here", "there"),
    [
        ("vit", "vit.layers.1.attention.q_proj", "vit.encoder.layer.1.attention.attention.query"),
        ("vit", "vit.layers.0.mlp.fc2", "vit.encoder.layer.0.output.dense"),
        ("neox", "lm_head", "embed_out"),
        ("llama", "model.layers.2.mlp.up_proj", "layers.2.mlp.up_proj"),
    ],
)
def test_names_of_another_version(name, here, there, tmp_path):
    """An adapter made with transformers 4, or of the bare trunk."""
    model = build(name)
    save_adapter(adapted(model, "kernel$"), tmp_path)
    expected = load_adapter(model, tmp_path)
    tensors = tensors_in(tmp_path)
    renamed = {key.replace(f".{here}.", f".{there}."): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    rewrite(tmp_path, tensors=renamed)
    got = load_adapter(model, tmp_path)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    rewrite(tmp_path, tensors=tensors | renamed)
    with pytest.raises(FolderError, match=r": a second pair, in addition to that of "):
        load_adapter(model, tmp_path)


def test_a_value_head_is_a_score_there(tmp_path):
    head = ClassHead(name="value", num_classes=1, pool="none", bias=False)
    model = build(dataclasses.replace(TINY["opt"], heads=(head,)))
    save_adapter(adapted(model, "heads", rank=1), tmp_path)
    assert sorted(tensors_in(tmp_path)) == [
        "base_model.model.score.lora_A.weight",
        "base_model.model.score.lora_B.weight",
    ]
    after = load_adapter(model, tmp_path)
    assert after.heads["value"].dense.kernel.get_value().a.shape == (8, 1)  # of d_embed


def test_what_is_written(tmp_path):
    model = adapted(build("llama"), r"attention\.(query|value)\.kernel", alpha=6.0)
    save_adapter(model, tmp_path / "new" / "folder", base="someone/their-llama")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert config_in(folder) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/their-llama",
        "target_modules": ["q_proj", "v_proj"],
        "r": 2,
        "lora_alpha": 6,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    save_adapter(adapted(build("gpt2"), "up.kernel", rank=1), folder)  # over the other
    assert (config_in(folder)["target_modules"], config_in(folder)["r"]) == (["c_fc"], 1)
    assert config_in(folder)["fan_in_fan_out"] is True
    assert len(tensors_in(folder)) == 2 * 3


def test_what_is_zero_is_left_out(tmp_path):
    """Components that only fill up, and layers of nothing else."""
    model = build("llama")

    def thin(weight):
        if not isinstance(weight, LoRA):
            return weight
        zero = lambda x, *index: x.at[index].set(0)
        a = zero(zero(weight.a, 0, slice(None), slice(1, 3)), 2)
        b = zero(zero(weight.b, 0, slice(1, 3)), 2)
        return LoRA(weight.base, a, b, weight.scale)

    before = map_weights(adapted(model, "feed_forward.down", rank=4, alpha=2.0), thin, "down")
    save_adapter(before, tmp_path)
    tensors = tensors_in(tmp_path)
    assert {name.split(".")[4]: a.shape for name, a in tensors.items() if "lora_A" in name} == {
        "0": (2, 24),
        "1": (4, 24),
    }
    after = load_adapter(model, tmp_path)
    for path, weight in weights(before).items():
        np.testing.assert_allclose(dense(weights(after)[path]), dense(weight), atol=1e-6)


@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.one_of(st.integers(1, 512), st.floats(1e-3, 1e3))),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
def test_scales_come_back(pairs, root):
    """Exactly where alpha was a whole number, and within the last digit of a double otherwise."""
    divisor = lambda rank: math.sqrt(rank) if root else rank
    written = [(f"h.{i}.x", r, alpha / divisor(r)) for i, (r, alpha) in enumerate(pairs)]
    fields = json.loads(json.dumps(write_scaling(written)))
    scaling = read_scaling(fields)
    whole = all(isinstance(alpha, int) for _, alpha in pairs)
    for name, rank, scale in written:
        assert scaling.rank_of(name) == rank
        assert abs(scaling.scale_of(name) - scale) <= (0 if whole else math.ulp(scale))
    if whole:
        values = [fields["lora_alpha"], *fields["alpha_pattern"].values()]
        assert all(isinstance(value, int) for value in values)


NAMES = st.lists(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), min_size=1, unique=True
)


@given(NAMES, st.data())
def test_targets_mean_the_adapted_modules_and_no_other(names, data):
    adapted = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    chosen = targets(adapted, names)
    meant = [n for n in names if any(n == end or n.endswith(f".{end}") for end in chosen)]
    assert sorted(meant) == sorted(adapted)


@pytest.fixture
def adapter(tmp_path):
    """A base, and the folder of an adapter of it."""
    model = build("llama")
    save_adapter(adapted(model, r"attention\.query", alpha=4.0), tmp_path)
    return model, tmp_path


def test_all_that_is_wrong_is_in_one_error(adapter):
    model, folder = adapter
    tensors = tensors_in(folder)
    start = "base_model.model.model.layers"
    del tensors[f"{start}.0.self_attn.q_proj.lora_B.weight"]
    tensors[f"{start}.1.self_attn.q_proj.lora_A.weight"] = np.zeros((3, 16), np.float32)
    tensors[f"{start}.2.self_attn.q_proj.lora_A.weight"] = np.zeros((2, 16), np.int32)
    tensors[f"{start}.2.self_attn.q_proj.lora_embedding_A"] = np.zeros((2, 16), np.float32)
    tensors[f"{start}.7.self_attn.q_proj.lora_A.weight"] = np.zeros((2, 16), np.float32)
    tensors[f"{start}.0.input_layernorm.lora_A.weight"] = np.zeros((2, 16), np.float32)
    tensors[f"{start}.0.self_attn.q_proj.lora_magnitude_vector"] = np.zeros(16, np.float32)
    tensors[f"{start}.0.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    tensors["something"] = np.zeros(1, np.float32)
    rewrite(folder, tensors=tensors, use_dora=True)
    with pytest.raises(FolderError) as error:
        load_adapter(model, folder)
    assert str(error.value).splitlines()[1:] == [
        "  use_dora=True: not supported (DoRA)",
        f"  {start}.0.mlp.up_proj.weight: a whole trained weight that modules_to_save does not name is not supported",
        f"  {start}.0.self_attn.q_proj.lora_magnitude_vector: magnitudes, as in DoRA, are not supported",
        "  unexpected: something",
        "  model.layers.0.input_layernorm: PEFT does not support a pair in this module",
        f"  missing: {start}.0.self_attn.q_proj.lora_B.weight",
        f"  wrong shape: {start}.1.self_attn.q_proj.lora_A.weight [3, 16], but the model and a rank of 2 need [2, 16]",
        f"  unexpected: {start}.2.self_attn.q_proj.lora_embedding_A",
        f"  not of a float type: {start}.2.self_attn.q_proj.lora_A.weight int32",
        "  model.layers.7.self_attn.q_proj: this model has no such module",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "VERA"}, "peft_type='VERA': only LORA is supported"),
        ({"peft_type": None}, "peft_type=None: only LORA is supported"),
        ({"use_qalora": True}, r"use_qalora=True: not supported \(QALoRA\)"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens=\[1\]: not supported \(activated LoRA\)"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\]: not supported \(a model with repeated layers\)"),
        ({"init_lora_weights": "pissa_niter_16"}, "belongs to a base with changed weights"),
        ({"r": 0}, r"adapter_config\.json: r must be a whole number from 1 to 2147483647, got 0"),
        ({"r": "8"}, r"adapter_config\.json: r must be a whole number from 1 to 2147483647, got '8'"),
        ({"lora_alpha": math.nan}, r"adapter_config\.json: lora_alpha must be a finite number, got nan"),
        ({"lora_alpha": None}, r"adapter_config\.json: lora_alpha must be a finite number, got null"),
        ({"rank_pattern": {"(": 4}}, r"adapter_config\.json: rank_pattern has the pattern '\(', which is not a supported regular expression: missing \)"),
        ({"rank_pattern": {"(q+)+x": 4}}, r"adapter_config\.json: rank_pattern has the pattern '\(q\+\)\+x', which is not a supported regular expression: '\+x' is not supported\. Name the modules"),
        ({"rank_pattern": {"q_proj": 0}}, r"adapter_config\.json, in rank_pattern: q_proj must be a whole number from 1 to 2147483647, got 0"),
        ({"alpha_pattern": ["x"]}, r"adapter_config\.json: alpha_pattern must be an object, got \['x'\]"),
        ({"rank_pattern": {"q_proj": 3}}, r"wrong shape: base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight \[2, 16\], but the model and a rank of 3 need \[3, 16\]"),
        ({"alpha_pattern": {"1.self_attn.q_proj": 12}}, r"layers\.1\.self_attn\.q_proj has the scale 6\.0"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(fields, message, adapter):
    model, folder = adapter
    rewrite(folder, **fields)
    with pytest.raises(FolderError, match=message):
        load_adapter(model, folder)


def test_configs_that_change_nothing(adapter):
    """What only trains, or only says where to put pairs: the tensors' names tell that."""
    model, folder = adapter
    expected = load_adapter(model, folder)
    others = {"target_modules": "all-linear", "exclude_modules": ["x"], "init_lora_weights": "eva"}
    rewrite(folder, lora_dropout=0.5, velora_config={"rank": 1}, layers_pattern="layers", **others)
    assert jax.tree.structure(load_adapter(model, folder)) == jax.tree.structure(expected)


def test_folders_and_files(adapter):
    model, folder = adapter
    with pytest.raises(FolderError, match="there is no folder"):
        load_adapter(model, folder / "nowhere")
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(
        FolderError,
        match=r"adapter_model\.safetensors': is not a valid safetensors file: Error while deserializing header: incomplete",
    ):
        load_adapter(model, folder)
    file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:])
    with pytest.raises(FolderError, match="does not match its checksum"):
        load_adapter(model, folder)
    file.unlink()
    with pytest.raises(FolderError, match=r"has no adapter_model\.safetensors and no adapter_m"):
        load_adapter(model, folder)
    file.symlink_to(folder / "gone")
    with pytest.raises(FolderError, match="the file does not exist"):
        load_adapter(model, folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FolderError, match=r"has no adapter_config\.json"):
        load_adapter(model, folder)
    (folder / "file").write_text("")
    with pytest.raises(FolderError, match="is a file; pass a folder"):
        save_adapter(adapted(model), folder / "file")


def test_an_adapter_of_nothing(adapter):
    model, folder = adapter
    safetensors.numpy.save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(FolderError, match="it contains no pair"):
        load_adapter(model, folder)


def test_a_model_that_has_pairs(adapter):
    model, folder = adapter
    once = load_adapter(model, folder)
    with pytest.raises(
        FolderError,
        match=r"groups\.0\.blocks\.0\.attention\.query\.kernel of the model already has a pair; call merge_lora or unmerge_lora first",
    ):
        load_adapter(once, folder)
    save_adapter(adapted(model, r"attention\.out"), folder)
    both = load_adapter(once, folder)  # beside other weights there is room
    assert sum(isinstance(weight, LoRA) for weight in weights(both).values()) == 2


def test_values_that_are_not_a_number(adapter):
    model, folder = adapter
    tensors = tensors_in(folder)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    tensors[name] = np.full_like(tensors[name], np.nan)
    rewrite(folder, tensors=tensors)
    with pytest.warns(UserWarning, match=rf"{name} contains NaN"):
        load_adapter(model, folder)


def test_float64_becomes_float32(adapter):
    model, folder = adapter
    tensors = {name: a.astype(np.float64) for name, a in tensors_in(folder).items()}
    expected = load_adapter(model, folder)
    rewrite(folder, tensors=tensors)
    for a, b in zip(
        jax.tree.leaves(load_adapter(model, folder)), jax.tree.leaves(expected), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_scales_that_grow_too_large(tmp_path):
    """A ratio is a power of two, and still a number would not fit its type."""
    model = build("llama")
    before = adapted(model, r"attention\.query", alpha=2.0)
    half = lambda w: LoRA(w.base, *(x.astype(jnp.float16) for x in (w.a, w.b)), w.scale)
    save_adapter(map_weights(before, half, r"attention\.query"), tmp_path)
    rewrite(tmp_path, alpha_pattern={"1.self_attn.q_proj": 2**17})
    with pytest.raises(
        FolderError,
        match=r"model\.layers\.1\.self_attn\.q_proj has the scale 65536\.0, but others that share its weight have 1\.0",
    ):
        load_adapter(model, tmp_path)
    rewrite(tmp_path, alpha_pattern={"1.self_attn.q_proj": 2**7})
    load_adapter(model, tmp_path)


def test_pairs_that_cannot_be_saved(tmp_path):
    model = build("opt")
    with pytest.raises(
        ValueError, match=r"the model has no LoRA pairs to save\. Add some with add_lora"
    ):
        save_adapter(model, tmp_path)
    with pytest.raises(
        ValueError, match=r"embed\.positions\.embedding: PEFT does not support a pair there"
    ):
        save_adapter(adapted(model, r"positions\.embedding"), tmp_path)
    zero = jax.tree.map(jnp.zeros_like, adapted(model))
    with pytest.raises(ValueError, match="all LoRA pairs of the model are zero"):
        save_adapter(zero, tmp_path)
    fused = adapted(adapted(build("gpt2"), r"\.query\."), r"\.key\.", alpha=6.0)
    with pytest.raises(
        ValueError, match=r"h\.0\.attn\.c_attn \(.*\.key\.kernel\) has the scale 3\.0"
    ):
        save_adapter(fused, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_transformers_has_not(adapter):
    head = ClassHead(num_classes=3, pool="mean")
    model = build(dataclasses.replace(TINY["gpt2"], heads=(head,)))
    with pytest.raises(ValueError, match="transformers has no family with this config"):
        load_adapter(model, adapter[1])
