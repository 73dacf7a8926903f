"""Configs refuse what cannot be, and say what could."""

import dataclasses
import inspect
import math
from functools import partial

import jax
import pytest
from flax import nnx

from effscale.models import (
    Alibi,
    AttentionConfig,
    BlockConfig,
    ClassHead,
    Group,
    LearnedPositions,
    LMHead,
    MLPConfig,
    NormConfig,
    PatchInputs,
    Rotary,
    TokenInputs,
    Transformer,
    TransformerConfig,
    bert,
    bloom,
    gpt2,
    gptj,
    llama,
    neox,
    opt,
    vit,
)
from effscale.options import did_you_mean

ATTENTION, MLP = AttentionConfig(num_heads=2), MLPConfig(d_ff=8)
BLOCK = BlockConfig(attention=ATTENTION, feed_forward=MLP)
GROUP = Group(blocks=(BLOCK,), repeat=2)
TEXT = TokenInputs(vocab_size=9)
MODEL = TransformerConfig(d_model=8, groups=(GROUP,), inputs=TEXT, positions=None)
SMALL = {"num_layers": 1, "d_model": 8, "num_heads": 2}
replace = dataclasses.replace


def unchecked(config, **changes):
    """What a user meets, for whom no type checker stands before a config's own checks."""
    new = object.__new__(type(config))
    for field in dataclasses.fields(config):
        object.__setattr__(new, field.name, changes.get(field.name, getattr(config, field.name)))
    new.__post_init__()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedPositions(num=0), r"LearnedPositions\.num must be at least 1.*, got 0"),
        (lambda: LearnedPositions(num=4, offset=-1), r"LearnedPositions\.offset must be at least 0, got -1"),
        (lambda: Rotary(dim=3), r"Rotary\.dim must be an even number, or None, got 3"),
        (lambda: Rotary(dim=0), r"Rotary\.dim must be at least 1, or None, got 0"),
        (lambda: Rotary(base=0.0), r"Rotary\.base must be above 0.*, got 0\.0"),
        (lambda: unchecked(NormConfig(), kind="rmss"), r"NormConfig\.kind must be one of 'layer', 'rms', got 'rmss'; did you mean 'rms'\?"),
        (lambda: NormConfig(epsilon=0.0), r"NormConfig\.epsilon must be above 0.*, got 0\.0"),
        (lambda: AttentionConfig(num_heads=0), r"AttentionConfig\.num_heads must be at least 1.*, got 0"),
        (lambda: AttentionConfig(num_heads=8, num_kv_heads=3), r"num_kv_heads must be a divisor of num_heads=8.*, got 3"),
        (lambda: AttentionConfig(num_heads=8, num_kv_heads=0), r"num_kv_heads must be at least 1, or None, got 0"),
        (lambda: AttentionConfig(num_heads=8, head_dim=0), r"head_dim must be at least 1.*, got 0"),
        (lambda: AttentionConfig(num_heads=8, dropout=1.0), r"AttentionConfig\.dropout must be from 0 to below 1, got 1\.0"),
        (lambda: AttentionConfig(num_heads=8, scale=0.0), r"AttentionConfig\.scale must be above 0, or None, got 0\.0"),
        (lambda: MLPConfig(d_ff=0), r"MLPConfig\.d_ff must be at least 1.*, got 0"),
        (lambda: unchecked(MLP, activation="gelu_tan"), r"activation must be one of 'gelu', .*, got 'gelu_tan'; did you mean 'gelu_tanh'"),
        (lambda: unchecked(MLP, activation="zzz"), r"activation must be one of 'gelu', .*'silu'.*, got 'zzz'$"),
        (lambda: unchecked(BLOCK, residual="paralel"), r"BlockConfig\.residual must be one of .*, got 'paralel'; did you mean 'parallel'"),
        (lambda: replace(BLOCK, dropout=-0.1), r"BlockConfig\.dropout must be from 0 to below 1, got -0\.1"),
        (lambda: Group(blocks=(), repeat=1), r"Group\.blocks must be a tuple whose length is at least 1, got \(\)"),
        (lambda: TokenInputs(vocab_size=0), r"TokenInputs\.vocab_size must be at least 1.*, got 0"),
        (lambda: replace(TEXT, d_embed=0), r"TokenInputs\.d_embed must be at least 1.*, got 0"),
        (lambda: replace(TEXT, type_vocab_size=-1), r"TokenInputs\.type_vocab_size must be at least 0, got -1"),
        (lambda: replace(TEXT, dropout=2.0), r"TokenInputs\.dropout must be from 0 to below 1, got 2\.0"),
        (lambda: PatchInputs(image_size=20, patch_size=8), r"patch_size must be a divisor of image_size=20.*, got 8"),
        (lambda: PatchInputs(image_size=0, patch_size=8), r"image_size must be at least 1.*, got 0"),
        (lambda: PatchInputs(image_size=8, patch_size=0), r"patch_size must be at least 1, got 0"),
        (lambda: PatchInputs(image_size=8, patch_size=4, channels=0), r"channels must be at least 1.*, got 0"),
        (lambda: PatchInputs(image_size=8, patch_size=4, dropout=1.0), r"PatchInputs\.dropout must be from 0 to below 1, got 1\.0"),
        (lambda: replace(MODEL, d_model=0), r"TransformerConfig\.d_model must be at least 1.*, got 0"),
        (lambda: replace(MODEL, groups=()), r"TransformerConfig\.groups must be a tuple whose length is at least 1, got \(\)"),
        (lambda: unchecked(MODEL, dtype="bf16"), r"TransformerConfig\.dtype must be one of .*, got 'bf16'; did you mean 'bfloat16'"),
        (lambda: unchecked(MODEL, attention_implementation="splsh"), r"attention_implementation must be one of .*, got 'splsh'; did you mean 'splash'"),
        (lambda: unchecked(MODEL, remat="al"), r"TransformerConfig\.remat must be one of 'none', 'full', .*, got 'al'"),
        (lambda: unchecked(MODEL, remat=("query", "mlp")), r"remat=\('query', 'mlp'\): 'mlp' is not a point .* Use 'layer_in', .* 'feed_forward_up'"),
        (lambda: unchecked(MODEL, remat=3), r"remat must be one of 'none', .* or a tuple, got 3"),
        (lambda: unchecked(MODEL, pooler_activation="tanhh"), r"TransformerConfig\.pooler_activation must be one of .*, got 'tanhh'; did you mean 'tanh'"),
        (lambda: replace(MODEL, init_std=0.0), r"TransformerConfig\.init_std must be above 0.*, got 0\.0"),
        (lambda: replace(MODEL, d_model=9), r"num_heads must divide d_model=9, got 2\. Use one of \[1, 3, 9\]"),
        (lambda: replace(MODEL, positions=Rotary(dim=6)), r"positions must be rotary .* at most head_dim=4 dimensions, got Rotary\(dim=6"),
        (lambda: replace(MODEL, d_model=6, positions=Rotary()), r"positions must be rotary over an even number .*, got Rotary\(dim=None"),
        (lambda: replace(MODEL, positions=Alibi(), causal=False), r"causal must be True with Alibi.*, got False"),
        (lambda: replace(MODEL, heads=(LMHead(), LMHead(tied=False))), r"heads must be heads with different names, got .*LMHead"),
        (lambda: replace(MODEL, heads=(LMHead(name="hidden"),)), r"heads must be heads with names other than \{'hidden'\}.*, got .*LMHead"),
        (
            lambda: replace(MODEL, inputs=PatchInputs(image_size=8, patch_size=4), positions=LearnedPositions(num=4)),
            r"positions must be learned with num=5 .*for these images, got LearnedPositions\(num=4",
        ),
        (
            lambda: replace(MODEL, inputs=PatchInputs(image_size=8, patch_size=4), positions=LearnedPositions(num=5, offset=2)),
            r"positions must be learned with num=5 and offset=0 for these images, got LearnedPositions\(num=5, offset=2\)",
        ),
        (
            lambda: replace(
                MODEL, positions=Rotary(), groups=(GROUP, Group(blocks=(replace(BLOCK, attention=AttentionConfig(num_heads=1)),), repeat=1))
            ),
            r"groups must be groups with the same head_dim if positions are rotary \(here .*\), got ",
        ),
        (lambda: ClassHead(num_classes=0), r"ClassHead\.num_classes must be at least 1.*, got 0"),
        (lambda: unchecked(ClassHead(num_classes=2), pool="frist"), r"ClassHead\.pool must be one of .*, got 'frist'; did you mean 'first'"),
        (lambda: ClassHead(num_classes=2, dropout=1.0), r"ClassHead\.dropout must be from 0 to below 1, got 1\.0"),
        (lambda: opt(num_layers=1, d_model=8, num_heads=2, d_ff=0), r"MLPConfig\.d_ff must be at least 1, got 0"),
        (lambda: gpt2(num_layers=0, d_model=8, num_heads=2), r"^num_layers must be at least 1.*, got 0"),
        (lambda: bert(num_layers=1, d_model=0, num_heads=2), r"^d_model must be at least 1.*, got 0"),
        (lambda: neox(num_layers=1, d_model=8, num_heads=0), r"^num_heads must be at least 1.*, got 0"),
        (lambda: gpt2(**SMALL, max_length=0), r"^max_length must be at least 1.*, got 0"),
        (lambda: gpt2(**SMALL, embed_dropout=1.0), r"^embed_dropout must be in \[0, 1\).*, got 1\.0"),
        (lambda: llama(**SMALL, d_ff=8, attention_dropout=-0.5), r"^attention_dropout must be in.*, got -0\.5"),
        (lambda: llama(**SMALL, d_ff=8, rotary_base=math.inf), r"^rotary_base must be above 0.*, got inf"),
        (lambda: gptj(**SMALL, rotary_dim=3), r"^rotary_dim must be an even number.*, got 3"),
        (lambda: neox(**SMALL, rotary_fraction=math.nan), r"^rotary_fraction must be above 0 and at most 1, got nan"),
        (lambda: neox(**SMALL, rotary_fraction=0.25), r"^rotary_fraction must make an even number .* of the 4 .*, got 0\.25, which makes 1"),
        (lambda: replace(MODEL, init_std=math.inf), r"init_std must be a finite number, got inf"),
        # Not all the divisors of a width of any size: that would take a minute here, and hours for a larger one.
        (lambda: replace(MODEL, d_model=10**9 + 1), r"num_heads must divide .*, got 2\. Use one of \[1, 7, 11, 13, 19\], or set head_dim"),
        (lambda: gpt2(num_layers=1, d_model=10**18 + 9, num_heads=10**9), r"num_heads must divide .*, got 1000000000\. Set head_dim"),
        (lambda: gpt2(num_layers=1, d_model=8, num_heads=3), r"num_heads must divide d_model=8, got 3\. Use one of \[1, 2, 4, 8\]"),
    ],
)  # fmt: skip
def test_impossible_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_derived_values():
    assert (MODEL.num_layers, MODEL.max_length, MODEL.hidden_width) == (2, None, 8)
    assert gpt2(num_layers=1, d_model=8, num_heads=2, max_length=77).max_length == 77
    assert opt(num_layers=1, d_model=8, num_heads=2, d_embed=4).hidden_width == 4
    images = vit(num_layers=1, d_model=8, num_heads=2, image_size=12, patch_size=4)
    assert (images.inputs.num_tokens, images.max_length, images.hidden_width) == (10, 10, 8)
    wide = AttentionConfig(num_heads=3, head_dim=5)
    assert wide.width(8) == 5


def test_layers_of_their_own_scales():
    size = {"num_layers": 3, "d_model": 8, "num_heads": 2}
    scales = lambda **flags: [b.attention.scale for b in gpt2(**size, **flags).blocks]
    assert scales() == [None]
    assert scales(scale_attention=False) == [1.0]
    assert scales(scale_by_layer=True) == [0.5, 0.25, 0.5 / 3]
    assert scales(scale_attention=False, scale_by_layer=True) == [1.0, 0.5, 1 / 3]
    config = gpt2(**size, scale_by_layer=True)
    assert config.num_layers == 3
    assert all(group.repeat == 1 for group in config.groups)


@pytest.mark.parametrize(
    "make",
    [gpt2, opt, bloom, partial(gptj, rotary_dim=4), partial(neox, rotary_fraction=1.0), partial(llama, d_ff=8), bert, partial(vit, image_size=4, patch_size=2)],
    ids=["gpt2", "opt", "bloom", "gptj", "neox", "llama", "bert", "vit"],
)  # fmt: skip
def test_dropouts_apart(make):
    def rates(**given):
        config = make(**SMALL, **given)
        block = config.blocks[0]
        return config.inputs.dropout, block.attention.dropout, block.dropout

    inputs = 0.0 if make in (opt, bloom) else 0.2  # these two drop no embeddings
    assert rates(dropout=0.2) == (inputs, 0.2, 0.2)
    assert rates(dropout=0.2, attention_dropout=0.0) == (inputs, 0.0, 0.2)
    assert rates(attention_dropout=0.3) == (0.0, 0.3, 0.0)
    if "embed_dropout" in inspect.signature(make).parameters:
        assert rates(dropout=0.2, embed_dropout=0.0) == (0.0, 0.2, 0.2)
        assert rates(embed_dropout=0.1, attention_dropout=0.3) == (0.1, 0.3, 0.0)


def test_an_opt_without_a_final_norm():
    assert opt(**SMALL).final_norm is not None
    assert opt(**SMALL, final_norm=False).final_norm is None
    assert opt(**SMALL, post_norm=True).final_norm is None


def test_configs_are_hashable_values():
    make = lambda: gpt2(num_layers=1, d_model=8, num_heads=2)
    assert make() == make()
    assert hash(make()) == hash(make())
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().d_model = 9


def test_head_dim_may_differ_from_the_width_of_a_share(tokens):
    attention = AttentionConfig(num_heads=3, num_kv_heads=1, head_dim=6, out_bias=False)
    config = replace(
        MODEL,
        groups=(Group(blocks=(replace(BLOCK, attention=attention),), repeat=2),),
        positions=Rotary(),
    )
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    layer = model.groups[0].blocks[0].attention
    assert layer.query.kernel.shape == (2, 8, 18)
    assert layer.value.kernel.shape == (2, 8, 6)
    assert layer.out.bias is None
    assert jax.eval_shape(lambda m: m(tokens(config)), model)["hidden"].shape == (3, 9, 8)


def test_did_you_mean():
    assert did_you_mean("gtp2", ["gpt2", "bert"]) == "did you mean 'gpt2'?"
    assert (
        did_you_mean("bert-basee", ["bert-base", "bert-large"])
        == "did you mean 'bert-base' or 'bert-large'?"
    )
    assert did_you_mean("zzz", ["a", "b"]) == "choose one of 'a', 'b'"
