"""The tables of tensors: layouts as the original code has them, laws of rules, and a place for everything."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from effscale.interop.families import FAMILIES
from effscale.interop.families.llama import GGUF_TABLE, LLAMA
from effscale.interop.pieces import Pieces
from effscale.interop.plan import parameters, plan, their_shapes
from effscale.interop.save import part
from effscale.interop.table import Rule, conv1d, fused_by_head, fused_conv1d, linear, sizes
from effscale.models import MLPConfig, abstract_model, gpt2
from effscale.parallel import MeshConfig
from tests.interop.spaces import (
    ARCHITECTURES,
    CLASSES,
    DECODERS,
    EVERY_CLASS,
    LLAMAS,
    cases,
    example,
)

AXES = {"h": 3, "g": 1, "t": 2}
WIDTH, HEADS, HEAD_DIM = 6, 3, 4


def fused(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_linear_is_transposed_and_conv1d_is_not():
    x = fused(4, 6)
    (ours,) = linear("a", "b")[0].to_ours(x, {})
    np.testing.assert_array_equal(ours, x.T)
    (ours,) = conv1d("a", "b")[0].to_ours(x, {})
    np.testing.assert_array_equal(ours, x)


def test_fused_by_head():
    """BLOOM's and NeoX's forward pass: ``view(..., heads, 3, head_dim)`` of what the rows give."""
    weight, bias = fused(3 * HEADS * HEAD_DIM, WIDTH), fused(3 * HEADS * HEAD_DIM)
    kernels = fused_by_head("qkv")[0].to_ours(weight, AXES)
    biases = fused_by_head("qkv")[1].to_ours(bias, AXES)
    x = np.random.default_rng(0).normal(size=(5, WIDTH))
    together = (x @ weight.T + bias).reshape(5, HEADS, 3, HEAD_DIM)
    for i in range(3):
        alone = (x @ kernels[i] + biases[i]).reshape(5, HEADS, HEAD_DIM)
        np.testing.assert_allclose(alone, together[:, :, i])


def test_fused_in_the_columns_of_a_conv1d():
    """GPT-2's forward pass: ``split(width, dim=2)`` of what the columns give."""
    weight, bias = fused(WIDTH, 3 * WIDTH), fused(3 * WIDTH)
    kernels = fused_conv1d("qkv")[0].to_ours(weight, AXES)
    biases = fused_conv1d("qkv")[1].to_ours(bias, AXES)
    for i in range(3):
        part = slice(i * WIDTH, (i + 1) * WIDTH)
        np.testing.assert_array_equal(kernels[i], weight[:, part])
        np.testing.assert_array_equal(biases[i], bias[part])


def test_a_patch_is_row_column_channel():
    rule = next(rule for rule in FAMILIES["vit"].trunk if rule.ours == "embed.patches.kernel")
    weight = fused(5, 3, 2, 2)
    (kernel,) = rule.to_ours(weight, {"p": 2, "q": 2, "c": 3})
    image = np.random.default_rng(0).normal(size=(2, 2, 3))
    expected = np.einsum("ocpq,pqc->o", weight, image)
    np.testing.assert_allclose(image.reshape(-1) @ kernel, expected)


def test_llama_cpp_s_order_of_rows():
    """Its converter takes ``(heads, 2, head_dim / 2)`` to ``(heads, head_dim / 2, 2)``; ours takes that back."""
    rule = next(rule for rule in GGUF_TABLE if rule.ours == "attention.query.kernel")
    weight = fused(HEADS * HEAD_DIM, WIDTH)
    written = weight.reshape(HEADS, 2, HEAD_DIM // 2, WIDTH).swapaxes(1, 2).reshape(weight.shape)
    np.testing.assert_array_equal(rule.to_ours(written, AXES)[0], weight.T)


@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=12)
@given(data=st.data())
def test_a_plan_fills_every_layer_of_every_parameter_once_and_leads_back(model_type, data):
    case = data.draw(cases(model_type))
    leaves, axes = parameters(abstract_model(case.config)), sizes(case.config)
    slots = plan(case.family.rules, case.config, leaves)
    assert len({slot.name for slot in slots}) == len(slots)
    filled = sorted((leaf, s.index) for s in slots for leaf in s.leaves)
    wanted = [
        (name, index)
        for name, leaf in leaves.items()
        for index in np.ndindex(leaf.shape[: name.startswith("groups.") + (".experts." in name)])
    ]
    assert filled == sorted(wanted)
    random = np.random.default_rng(0)
    for slot in slots:
        shapes = [leaves[leaf].shape[len(slot.index) :] for leaf in slot.leaves]
        ours = [random.normal(size=shape).astype(np.float32) for shape in shapes]
        theirs = slot.rule.to_theirs(ours, axes)
        assert theirs.shape == slot.rule.their_shape(shapes, axes)
        back = slot.rule.to_ours(theirs, axes)
        assert [x.tobytes() for x in back] == [x.tobytes() for x in ours]


def test_layers_are_counted_through_all_groups():
    """A GPT-2 whose scores are scaled by layer is a group a layer."""
    case = example("gpt2", "GPT2Model", scale_attn_by_inverse_layer_idx=True, n_layer=3)
    slots = plan(case.family.rules, case.config, parameters(abstract_model(case.config)))
    found = {slot.name: slot.leaves for slot in slots if "c_proj.bias" in slot.name}
    assert found["h.2.attn.c_proj.bias"] == ("groups.2.blocks.0.attention.out.bias",)
    assert [slot.index for slot in slots if slot.name.startswith("h.")] == [(0,)] * 3 * 12


def test_a_parameter_without_a_row():
    config = gpt2(num_layers=1, d_model=8, num_heads=2, vocab_size=5, max_length=4)
    (group,) = config.groups
    gated = MLPConfig(d_ff=8, gated=True)
    block = dataclasses.replace(group.blocks[0], feed_forward=gated)
    config = dataclasses.replace(config, groups=(dataclasses.replace(group, blocks=(block,)),))
    leaves = parameters(abstract_model(config))
    with pytest.raises(ValueError, match=r"no place for .*feed_forward\.gate\.kernel"):
        plan(FAMILIES["gpt2"].rules, config, leaves)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_table_names_nothing_twice(model_type):
    family = FAMILIES[model_type]
    trunk = [rule.theirs for rule in family.trunk]
    ours = [part for rule in family.trunk for part in rule.parts]
    assert len(set(trunk)) == len(trunk)
    assert len(set(ours)) == len(ours)
    # A head's tensor may have the name of another head's, of which a model has only one.
    pairs = [(rule.theirs, rule.ours) for rule in family.heads]
    assert len(set(pairs)) == len(pairs)
    for pattern in family.ignored:
        assert not any(re.fullmatch(pattern, name.format(0, 0)) for name in trunk)


def test_a_rule_takes_only_the_axes_of_its_layout():
    rule = Rule("a", "b", "(h d) -> h d")
    (array,) = rule.to_ours(fused(6), AXES | {"p": 16, "n": 5})
    assert array.shape == (3, 2)
    assert not rule.in_layer
    assert Rule("h.{}.a", "b").in_layer


def test_every_row_is_used_by_some_model():
    used = {family: set() for family in FAMILIES}
    for model_type, architecture in EVERY_CLASS:
        narrow = {"word_embed_proj_dim": 5} if model_type == "opt" else {}
        untied = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
        untied |= {"mlp_only_layers": [0]}  # of the Qwens with experts
        case = example(model_type, architecture, **narrow, **untied)
        leaves = parameters(abstract_model(case.config))
        used[model_type] |= {slot.rule for slot in plan(case.family.rules, case.config, leaves)}
    allowed = {
        # No class of transformers has them: DeepSpeed-Chat's value, and rows that families share.
        *(
            "v_head.weight",
            "lm_head.bias",
            "score.bias",
            "embed_out.bias",
            "decoder.project_in.bias",
        ),
        *("decoder.project_out.bias", "norm.bias"),
    }
    for model_type, family in FAMILIES.items():
        # A file does not tell a score from classes, so that none is loaded under this name unless asked for.
        rules = [r for r in family.rules if not r.parts[0].startswith("heads.score.")]
        unused = {rule.theirs for rule in rules if rule not in used[model_type]}
        unused -= {n for n in unused if model_type in LLAMAS and n.endswith("layernorm.bias")}
        if (
            model_type in LLAMAS and model_type != "llama"
        ):  # their rows are Llama's, whose biases they lack
            unused -= {n for n in unused if n.endswith("_proj.bias")}
        if model_type == "olmoe":  # it has no classes for classes and spans
            unused -= {n for n in unused if n.startswith(("score.", "qa_outputs."))}
        unused -= {
            n for n in unused if model_type == "gptj" and "attn." in n and n.endswith(".bias")
        }
        assert unused <= allowed, model_type
    assert LLAMA.rules != GGUF_TABLE


def test_spaces_name_every_class():
    assert {pair[0] for pair in CLASSES} == set(ARCHITECTURES)
    assert set(CLASSES) < set(EVERY_CLASS)
    assert set(DECODERS) < set(FAMILIES)


def test_experts_with_a_tensor_each_fill_one_stacked_parameter():
    """Mixtral's files: ``experts.K.w1.weight`` of each layer."""
    config = gpt2(num_layers=3, d_model=8, num_heads=2, vocab_size=5, max_length=4)
    rules = [
        Rule("layers.{}.experts.{}.w1.weight", "feed_forward.up", "o i -> i o"),
        Rule("layers.{}.gate.weight", "feed_forward.router", "e i -> i e"),
    ]
    leaf = lambda *shape: nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))
    path = "groups.0.blocks.0.feed_forward"
    leaves = {f"{path}.up": leaf(3, 2, 4, 6), f"{path}.router": leaf(3, 4, 2)}
    slots = plan(rules, config, leaves)
    shapes = their_shapes(slots, leaves, {})
    assert shapes["layers.2.experts.1.w1.weight"] == (6, 4)
    assert shapes["layers.2.gate.weight"] == (2, 4)
    assert len(slots) == len(shapes) == 3 * 2 + 3

    random = np.random.default_rng(0)
    theirs = {name: random.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    mesh = MeshConfig(data=2, expert=2, fsdp=2).build()
    places = {None: None, "divided": NamedSharding(mesh, PartitionSpec(None, "expert", "fsdp"))}
    for sharding in places.values():
        pieces = Pieces((3, 2, 4, 6), np.dtype("float32"), sharding)
        for slot in slots:
            if len(slot.index) == 2:
                pieces.put(slot.index, *slot.rule.to_ours(theirs[slot.name], {}))
        stacked = pieces.finish()
        for slot in slots:
            if len(slot.index) == 2:
                back = slot.rule.to_theirs([np.asarray(part(stacked, slot.index))], {})
                np.testing.assert_array_equal(back, theirs[slot.name])
