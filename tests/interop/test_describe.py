"""From a config back to transformers: whatever a family has, and errors that say what none has."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from effscale import data as text
from effscale.data.tokenizer import separator_id
from effscale.interop import load_pretrained, load_tokenizer, save_pretrained
from effscale.interop.describe import describe, essence
from effscale.interop.families import FAMILIES
from effscale.interop.families.rope import fields_of
from effscale.models import (
    Alibi,
    ClassHead,
    Group,
    LMHead,
    MLPConfig,
    NormConfig,
    Rotary,
    Transformer,
    bert,
    bert_pretraining_heads,
    bloom,
    gpt2,
    gptj,
    llama,
    neox,
    opt,
    take_layers,
    unroll,
    vit,
)
from tests.interop.files import bits_of, bytes_of, model_of_numbers, read_folder
from tests.interop.spaces import cases

SIZE: dict[str, Any] = {"num_layers": 2, "d_model": 24, "num_heads": 4}
TEXT = SIZE | {"vocab_size": 300}


@pytest.mark.parametrize("model_type", FAMILIES)
@given(data=st.data())
def test_every_config_of_a_family_comes_back(model_type, data):
    case = data.draw(cases(model_type))
    family, fields = describe(case.config, model_type)
    assert family is case.family
    assert fields["architectures"] == [case.architecture]
    assert fields["model_type"] == model_type
    back = family.from_hf({**family.defaults, **json.loads(json.dumps(fields))}, case.config.heads)
    assert essence(back) == essence(case.config)
    ours, theirs = case.config.blocks[0], back.blocks[0]
    assert theirs.attention.dropout == ours.attention.dropout
    assert theirs.dropout == ours.dropout
    assert back.inputs.dropout == case.config.inputs.dropout


def test_a_part_of_a_head_that_is_a_fraction():
    """Theirs is rounded down to a width again: one that falls short by a bit is a dimension fewer."""
    for head_dim in range(2, 257):
        for dim in range(2, head_dim + 1, 2):
            rope = fields_of(Rotary(dim=dim), head_dim)["rope_parameters"]
            assert int(head_dim * rope.get("partial_rotary_factor", 1.0)) == dim


def changed(config, **block):
    """The config with other fields of its blocks."""
    (group,) = config.groups
    blocks = tuple(dataclasses.replace(b, **block) for b in group.blocks)
    return dataclasses.replace(config, groups=(dataclasses.replace(group, blocks=blocks),))


def attention(config, **fields):
    return changed(config, attention=dataclasses.replace(config.blocks[0].attention, **fields))


def replace(config, **fields):
    return dataclasses.replace(config, **fields)


@dataclasses.dataclass(frozen=True)
class Experts:
    """A feed-forward that no family has."""

    num: int = 4

    def build(self, d_model, *, std, out_std, rngs):
        return MLPConfig(d_ff=8).build(d_model, std=std, out_std=out_std, rngs=rngs)


NONE = {
    "norm": (
        lambda: changed(gpt2(**TEXT), norm=NormConfig(kind="rms", bias=False)),
        r"layers\.norm\.kind is 'rms', and gpt2 has 'layer'",
    ),
    "residual": (
        lambda: changed(llama(**TEXT, d_ff=40), residual="post"),
        r"layers\.residual is 'post', and llama has 'pre'",
    ),
    "positions": (
        lambda: replace(llama(**TEXT, d_ff=40), positions=Alibi()),
        r"positions is 'Alibi'|layers",
    ),
    "no positions": (lambda: replace(gpt2(**TEXT), positions=None), "positions is None"),
    "grouped queries": (
        lambda: attention(gpt2(**TEXT), num_kv_heads=2),
        r"layers\.attention\.num_kv_heads is 2, and gpt2 has 4",
    ),
    "scale": (
        lambda: attention(opt(**TEXT), scale=0.3),
        r"layers\.attention\.scale is 0\.3, and opt has 0\.408",
    ),
    "epsilon": (
        lambda: changed(opt(**TEXT), norm=NormConfig(epsilon=1e-6)),
        r"layers\.norm\.epsilon is 1e-06, and opt has 1e-05",
    ),
    "bias": (
        lambda: attention(bloom(**TEXT), bias=False),
        r"layers\.attention\.bias is False, and bloom has True",
    ),
    "gate": (
        lambda: changed(gptj(**TEXT, rotary_dim=4), feed_forward=MLPConfig(d_ff=96, gated=True)),
        r"layers\.feed_forward\.gated is True, and gptj has False",
    ),
    "activation": (
        lambda: changed(bloom(**TEXT), feed_forward=MLPConfig(d_ff=96, activation="relu")),
        r"layers\.feed_forward\.activation is 'relu', and bloom has 'gelu_bloom'",
    ),
    "experts": (
        lambda: changed(gpt2(**TEXT), feed_forward=Experts()),
        "transformers has no family with the feed-forward Experts",
    ),
    "kinds of token": (
        lambda: replace(gpt2(**TEXT), inputs=replace(gpt2(**TEXT).inputs, type_vocab_size=2)),
        r"inputs\.type_vocab_size is 2, and gpt2 has 0",
    ),
    "both ways": (lambda: replace(gpt2(**TEXT), causal=False), "causal is False, and gpt2 has True"),
    "pooler": (lambda: replace(gpt2(**TEXT), pooler=True), "pooler is True, and gpt2 has False"),
    "two heads": (
        lambda: replace(gpt2(**TEXT), heads=(LMHead(), ClassHead(num_classes=3, pool="last", bias=False))),
        r"no GPT2 with the heads \['lm', 'classes'\]",
    ),
    "a class of each token": (
        lambda: replace(opt(**TEXT), heads=(ClassHead(name="token_classes", num_classes=3, pool="none"),)),
        r"no OPT with the heads \['token_classes'\]",
    ),
    "another pool": (
        lambda: replace(gpt2(**TEXT), heads=(ClassHead(num_classes=3, pool="mean"),)),
        "transformers has no family with this config: the head 'classes' must have pool='last', as in transformers, got 'mean'",
    ),
    "a head of berts": (
        lambda: replace(bert(**TEXT), heads=(ClassHead(name="mood", num_classes=3, pool="pooled"),)),
        r"no BERT with the heads \['mood'\]",
    ),
    "a head of vits": (
        lambda: replace(vit(**SIZE, image_size=8, patch_size=4), heads=(ClassHead(name="mood", num_classes=3),)),
        r"no ViT with the heads \['mood'\]",
    ),
    "a masked head on a gpt": (
        lambda: replace(gpt2(**TEXT), heads=(LMHead(transform="gelu"),)),
        r"heads\.0\.transform is 'gelu', and gpt2 has None",
    ),
    "a bias of the vocabulary": (
        lambda: replace(gpt2(**TEXT), heads=(LMHead(bias=True),)),
        r"heads\.0\.bias is True, and gpt2 has False",
    ),
    "another transform": (
        lambda: bert(**TEXT, heads=bert_pretraining_heads(activation="relu")),
        r"heads\.0\.transform is 'relu', and bert has 'gelu'",
    ),
    "another epsilon": (
        lambda: bert(**TEXT, heads=bert_pretraining_heads(epsilon=1e-5)),
        r"heads\.0\.norm\.epsilon is 1e-05, and bert has 1e-12",
    ),
    "a bias of classes": (
        lambda: replace(gpt2(**TEXT), heads=(ClassHead(num_classes=3, pool="last"),)),
        "transformers has no family with this config: the head 'classes' must have bias=False, as in transformers, got True",
    ),
    "classes without a bias": (
        lambda: replace(vit(**SIZE, image_size=8, patch_size=4), heads=(ClassHead(num_classes=3, bias=False),)),
        "transformers has no family with this config: the head 'classes' must have bias=True, as in transformers, got False",
    ),
    "three next sentences": (
        lambda: bert(**TEXT, heads=(ClassHead(name="nsp", num_classes=3, pool="pooled"),)),
        r"heads\.0\.num_classes is 3, and bert has 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE)
def test_what_no_family_has(name, tmp_path):
    make, message = NONE[name]
    with pytest.raises(ValueError, match=message) as raised:
        describe(make())
    assert len(str(raised.value)) < 500
    with pytest.raises(ValueError, match=message):
        save_pretrained(model_of_numbers(make()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unlike_layers():
    config = gpt2(**TEXT)
    (group,) = config.groups
    wide = dataclasses.replace(group.blocks[0], feed_forward=MLPConfig(d_ff=50))
    config = dataclasses.replace(
        config, groups=(Group(blocks=group.blocks, repeat=1), Group(blocks=(wide,), repeat=1))
    )
    with pytest.raises(ValueError, match=r"layers\.feed_forward\.d_ff is 50, and gpt2 has 96"):
        describe(config)


def test_how_a_model_is_trained_does_not_matter():
    config = gpt2(**TEXT)
    other = dataclasses.replace(
        config,
        remat="full",
        init_std=0.5,
        dtype="bfloat16",
        scale_residual_init=False,
        attention_implementation="blocks",
    )
    assert describe(other)[1] == describe(config)[1]


MADE_HERE = {
    "gpt2": gpt2(**TEXT, max_length=16),
    "opt": opt(**TEXT, max_length=16, d_embed=8, post_norm=True),
    "bloom": bloom(**TEXT),
    "gptj": gptj(**TEXT, rotary_dim=4),
    "neox": neox(**TEXT, rotary_fraction=0.67),
    "llama": llama(**TEXT, d_ff=40, num_kv_heads=2),
}


@pytest.mark.parametrize("name", MADE_HERE)
def test_models_by_layer_are_written_as_stacked_ones(name, tmp_path):
    model = Transformer(MADE_HERE[name], rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path / "stacked")
    save_pretrained(unroll(model), tmp_path / "by layer")
    assert bytes_of(read_folder(tmp_path / "by layer")) == bytes_of(
        read_folder(tmp_path / "stacked")
    )
    configs = [(tmp_path / n / "config.json").read_text() for n in ("by layer", "stacked")]
    assert configs[0] == configs[1]
    assert bits_of(load_pretrained(tmp_path / "by layer")) == bits_of(model)


def test_a_model_of_taken_layers_is_written_and_read(tmp_path):
    student = take_layers(Transformer(MADE_HERE["gpt2"], rngs=nnx.Rngs(0)), [1])
    save_pretrained(student, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.config.num_layers == 1
    assert bits_of(loaded) == bits_of(student)


def test_pairs_of_like_layers_are_written_as_single_ones(tmp_path):
    """A group may hold several blocks, which take turns."""
    config = MADE_HERE["gpt2"]
    (group,) = config.groups
    pairs = dataclasses.replace(config, groups=(Group(blocks=group.blocks * 2, repeat=2),))
    model = model_of_numbers(pairs)
    save_pretrained(model, tmp_path)
    back = load_pretrained(tmp_path)
    assert back.config.num_layers == 4
    for layer in range(4):
        (stacked,) = back.groups[0].blocks
        pair = model.groups[0].blocks[layer % 2]
        np.testing.assert_array_equal(
            stacked.attention.query.kernel.get_value()[layer],
            pair.attention.query.kernel.get_value()[layer // 2],
        )


@pytest.mark.parametrize("name", MADE_HERE)
def test_a_model_and_a_tokenizer_made_here(name, tmp_path):
    """What the quickstart leaves: transformers' Auto classes take it as it is."""
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    hf = pytest.importorskip("transformers", reason="transformers loads what was made here")
    from tests.interop.torch_models import complaints

    tokenizer = text.train_tokenizer(["low lower lowest, new newer newest"] * 9, vocab_size=280)
    model = jax.jit(lambda: Transformer(MADE_HERE[name], rngs=nnx.Rngs(0)))()
    save_pretrained(model, tmp_path, tokenizer=tokenizer)
    with complaints() as said:
        theirs, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        auto = hf.AutoTokenizer.from_pretrained(tmp_path)
    assert not said
    assert not any(info.values()), info
    ids = tokenizer.encode("the lowest, newest").ids
    assert auto("the lowest, newest")["input_ids"] == ids
    assert load_tokenizer(tmp_path).encode("the lowest, newest").ids == ids
    assert auto.eos_token_id == theirs.config.eos_token_id == separator_id(tokenizer)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([ids])).logits.numpy()
    found = jax.jit(lambda m, x: m(x))(model, np.array([ids], np.int32))
    np.testing.assert_allclose(found, expected, atol=1e-5)
