"""What runs cost, beside the numbers of the original recipes and of the compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from effscale.ltd import RandomLTD, layer_token_average, mslg, training_flops
from effscale.models import LMHead, MLPConfig, preset, vit
from effscale.training import LinearPacing, merge, stages

GPT = {"num_layers": 24, "num_ltd_layers": 22}
GPT_LTD = mslg(min_value=128, max_value=2048, require_steps=200_000, seq_per_step=16)
GPT_TRUNCATION = LinearPacing(
    min_difficulty=80, max_difficulty=2048, total=110_000, difficulty_step=8
)


@pytest.mark.parametrize(
    ("arguments", "average"),
    [
        ((2048, 128, 24, 22), 288),
        ((1024, 128, 12, 10), 277),
        ((1024, 128, 24, 22), 202),
        ((512, 512, 24, 22), 512),
        ((160, 168, 24, 22), 160),  # a curriculum has cut the row below what is kept
    ],
)
def test_layer_token_average(arguments, average):
    assert layer_token_average(*arguments) == average


def test_mean_cost_of_the_published_recipes():
    """Layer tokens of all steps, to those of as many steps on all tokens: 69.7 % and 64.2 %."""
    bert = mslg(min_value=128, max_value=512, require_steps=2_000_000, seq_per_step=16)
    for growth, length, steps, share in (
        (GPT_LTD, 2048, 286_102, 0.697),
        (bert, 512, 2_000_000, 0.642),
    ):
        kept = RandomLTD(pacing=growth).stages()
        layer_tokens = kept.total(steps, lambda r, length=length: 2 * length + 22 * r)
        assert round(layer_tokens / (24 * steps * length), 3) == share
        rounded = kept.total(steps, lambda r, length=length: layer_token_average(length, r, **GPT))
        assert 0 <= layer_tokens / 24 - rounded < steps


def test_iterations_of_a_run_that_stops_by_layer_tokens():
    """GPT-3 1.3B for 300 billion tokens, 512 rows a step, alone and after truncation."""
    kept = RandomLTD(pacing=GPT_LTD).stages()
    alone = kept.steps_until(300 * 10**9, lambda r: 512 * layer_token_average(2048, r, **GPT))
    assert alone == 372_789
    both = merge(stages(GPT_TRUNCATION), kept)
    cost = lambda value: 512 * layer_token_average(*value, **GPT)
    assert both.steps_until(300 * 10**9, cost) == 377_264
    consumed, raw = both.total(377_264, cost), both.total(377_264, lambda value: 512 * value[0])
    assert 0 <= consumed - 300 * 10**9 < 512 * 2048
    assert raw / 1e9 == pytest.approx(340, abs=1)
    first = next(i for i, (length, r) in enumerate(both.values) if r < length)
    assert both.starts[first] == 4918
    assert both.values[first] == (168, 160)


def test_composition_counts_the_shortened_rows():
    """The original's counter of layer tokens takes whole rows for its full layers, whatever the curriculum has left."""
    config = preset("gpt3-1.3b")
    ltd = RandomLTD(pacing=GPT_LTD)
    tokens = ltd.tokens_per_batch(config)
    batch = {"input_ids": np.zeros((4, 512), np.int32)}
    assert tokens(batch) == 4 * 512
    assert tokens(ltd.shape_batch(batch, 128)) == 4 * ((512 * 2 + 128 * 22) // 24)
    assert tokens(ltd.shape_batch(batch, 1024)) == 4 * 512


def test_images_count_their_patches():
    config = vit(num_layers=4, d_model=16, num_heads=2, image_size=12, patch_size=4)
    ltd = RandomLTD(pacing=mslg(min_value=4, max_value=10, require_steps=10))
    tokens = ltd.tokens_per_batch(config)
    batch = ltd.shape_batch({"images": np.zeros((3, 12, 12, 3)), "labels": np.zeros(3)}, 4)
    assert tokens(batch) == 3 * ((10 * 2 + 4 * 2) // 4)


@pytest.mark.parametrize(
    ("name", "seq"),
    [("gpt2", 10), ("gpt2", 128), ("llama", 128), ("bert", 10), ("bert", 128), ("vit", 10)],
)
def test_operations_are_those_of_the_program(name, seq, tiny):
    """The matrix products of a traced model of one layer, each counted from its shapes."""
    config = tiny(name).config
    one = dataclasses.replace(config.groups[0], repeat=1)
    config = dataclasses.replace(config, groups=(one,), heads=config.heads[:1])
    if name in ("gpt2", "bert"):  # so that any length will do
        config = dataclasses.replace(config, positions=None)
    model = tiny(config)
    inputs = jnp.zeros((1, 12, 12, 3)) if name == "vit" else jnp.zeros((1, seq), jnp.int32)

    def forward(model, inputs):
        encoded = model.encode(inputs)
        head = config.heads[0]
        if isinstance(head, LMHead):
            return model.heads[head.name](encoded.hidden, None, model.embed, None)
        return encoded.hidden

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                a, _ = (v.aval.shape for v in equation.invars)
                (contracted, _), _ = equation.params["dimension_numbers"]
                out = np.prod(equation.outvars[0].aval.shape)
                total += 2 * int(out) * int(np.prod([a[i] for i in contracted]))
            for inner in jaxprs_in_params(equation.params):
                total += count(inner)
        return total

    found = count(jax.make_jaxpr(forward)(model, inputs).jaxpr)
    assert training_flops(config, seq) == 3 * found


def test_operations_when_tokens_are_dropped():
    config = preset("gpt2")
    whole, part = training_flops(config, 1024), training_flops(config, 256)
    head = 6 * 768 * 50257  # a token's
    layers = lambda flops, tokens: (flops - head * tokens) / 12
    expected = head * 1024 + 2 * layers(whole, 1024) + 10 * layers(part, 256)
    assert training_flops(config, 1024, kept=256) == expected
    assert training_flops(config, 1024, kept=2000) == whole
    one = head * 1024 + 11 * layers(whole, 1024) + layers(part, 256)
    assert training_flops(config, 1024, kept=256, layers=(5,)) == one


class Other:
    def build(self, d_model, *, std, out_std, rngs):
        raise NotImplementedError


class Counted(Other):
    def multiplications(self, d_model):
        return 10 * d_model


def with_feed_forward(feed_forward):
    config = preset("gpt2")
    block = dataclasses.replace(config.blocks[0], feed_forward=feed_forward)
    group = dataclasses.replace(config.groups[0], blocks=(block,))
    return dataclasses.replace(config, groups=(group,))


def test_a_feed_forward_of_ones_own_says_its_operations():
    mine, theirs = (
        training_flops(with_feed_forward(f), 1024) for f in (Counted(), MLPConfig(d_ff=3072))
    )
    assert theirs - mine == 3 * 2 * 1024 * 12 * (2 * 768 * 3072 - 10 * 768)


def test_unknown_feed_forwards_are_an_error():
    with pytest.raises(
        ValueError,
        match=r"operations of feed_forward are unknown, got a Other.* multiplications\(d_model\)",
    ):
        training_flops(with_feed_forward(Other()), 1024)
