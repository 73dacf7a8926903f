"""Generation against the slow way: a full forward pass for each token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.generation import SamplingConfig, generate, left_pad
from effscale.models import Transformer, bert, bloom, gpt2, gptj, llama, neox, opt, vit

TINY = {"num_layers": 2, "d_model": 16, "num_heads": 2, "vocab_size": 40}
MODELS = {
    "gpt2": gpt2(**TINY, max_length=32),
    "opt": opt(**TINY, max_length=32),
    "bloom": bloom(**TINY),
    "gptj": gptj(**TINY, rotary_dim=4),
    "neox": neox(**TINY, rotary_fraction=0.5),
    "llama": llama(**TINY | {"num_heads": 4}, num_kv_heads=2, d_ff=24),
}
PROMPTS = [[3, 14, 15, 9, 2], [6, 5], [35]]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    # A larger scale than usual, so that the likeliest token is far from a tie.
    config = dataclasses.replace(MODELS[request.param], init_std=0.4)
    return Transformer(config, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def gpt():
    return Transformer(dataclasses.replace(MODELS["gpt2"], init_std=0.4), rngs=nnx.Rngs(1))


def slow_greedy(model, row, new):
    """The likeliest continuation of one unpadded row, by whole forward passes over a fixed length."""
    forward = jax.jit(lambda model, ids, mask: model(ids, attention_mask=mask))
    row, length = list(row), len(row) + new
    for _ in range(new):
        ids = np.zeros((1, length), np.int32)
        ids[0, : len(row)] = row
        logits = forward(model, ids, (np.arange(length) < len(row))[None])
        row.append(int(np.argmax(logits[0, len(row) - 1])))
    return row


def test_greedy_generation_with_left_padding_equals_full_forward_passes(model):
    tokens, mask = left_pad(PROMPTS)
    out = generate(
        model, tokens, SamplingConfig(max_new_tokens=8, temperature=0.0), attention_mask=mask
    )
    for row, kept, prompt in zip(*jax.device_get((out.tokens, out.mask)), PROMPTS, strict=True):
        assert row[kept].tolist() == slow_greedy(model, prompt, 8)
    assert out.num_new.tolist() == [8, 8, 8]


def test_a_cache_that_grows_gives_the_same_tokens(gpt, monkeypatch):
    tokens, mask = left_pad(PROMPTS)
    config = SamplingConfig(max_new_tokens=11, temperature=0.0, pad_id=1)
    whole = generate(gpt, tokens, config, attention_mask=mask)
    monkeypatch.setattr("effscale.generation.decoding.STAGE_TOKENS", 2)
    # Another config, or the compiled function with the whole cache would be found again.
    grown = generate(gpt, tokens, dataclasses.replace(config, pad_id=2), attention_mask=mask)
    assert grown.tokens[:, 5:].tolist() == whole.tokens[:, 5:].tolist()


def test_a_row_ends_with_its_stop_token_and_the_others_go_on(gpt):
    greedy = SamplingConfig(max_new_tokens=10, temperature=0.0)
    tokens, mask = left_pad(PROMPTS)
    free = generate(gpt, tokens, greedy, attention_mask=mask)
    stop = int(free.tokens[0, tokens.shape[1] + 2])
    stopped = generate(
        gpt, tokens, dataclasses.replace(greedy, stop_ids=(stop,), pad_id=39), attention_mask=mask
    )
    for before, after, kept, new in zip(
        *jax.device_get((free.tokens, stopped.tokens, stopped.mask, stopped.num_new)), strict=True
    ):
        answer = before[tokens.shape[1] :].tolist()
        end = answer.index(stop) + 1 if stop in answer else len(answer)
        assert new == end
        assert after[tokens.shape[1] :].tolist() == answer[:end] + [39] * (10 - end)
        assert kept[tokens.shape[1] :].tolist() == [True] * end + [False] * (10 - end)


def test_the_loop_ends_when_all_rows_have(gpt):
    prompt = [[3, 1]]
    first = int(
        generate(gpt, prompt, SamplingConfig(max_new_tokens=1, temperature=0.0)).tokens[0, 2]
    )
    config = SamplingConfig(max_new_tokens=20, temperature=0.0, stop_ids=(first,), pad_id=7)
    out = generate(gpt, prompt, config)
    assert out.num_new.tolist() == [1]
    assert out.tokens[0, 3:].tolist() == [7] * 19


def test_the_same_key_gives_the_same_tokens_and_another_key_others(gpt):
    config = SamplingConfig(max_new_tokens=12)
    prompt = np.full((4, 3), 5, np.int32)
    first, again = (generate(gpt, prompt, config, key=jax.random.key(3)).tokens for _ in range(2))
    other = generate(gpt, prompt, config, key=jax.random.key(4)).tokens
    assert (first == again).all()
    assert (first != other).any()
    assert len({tuple(row) for row in first.tolist()}) > 1, "rows must be drawn independently"


def test_a_row_does_not_depend_on_the_rows_beside_it(gpt):
    config = SamplingConfig(max_new_tokens=12, top_k=10)
    tokens, mask = left_pad(PROMPTS)
    together = generate(gpt, tokens, config, attention_mask=mask, key=jax.random.key(0))
    alone = generate(gpt, tokens[:1], config, attention_mask=mask[:1], key=jax.random.key(0))
    assert together.tokens[:1].tolist() == alone.tokens.tolist()


def test_a_repetition_penalty_keeps_seen_tokens_out(gpt):
    config = SamplingConfig(max_new_tokens=12, temperature=0.0, repetition_penalty=1e6)
    out = generate(gpt, [[3, 14, 15]], config).tokens[0].tolist()
    assert len(set(out)) == len(out)
    assert any(
        len(set(row)) < len(row)
        for row in generate(
            gpt, [[3, 14, 15]], dataclasses.replace(config, repetition_penalty=1.0)
        ).tokens.tolist()
    ), "without the penalty this model repeats itself, or the test shows nothing"


def test_the_model_is_not_changed(gpt):
    before = [np.asarray(x) for x in jax.tree.leaves(gpt)]
    generate(gpt, [[1, 2]], SamplingConfig(max_new_tokens=2, temperature=0.0))
    for old, new in zip(before, jax.tree.leaves(gpt), strict=True):
        np.testing.assert_array_equal(old, new)
    assert len(gpt.groups) == 1


def test_bfloat16_generates(gpt):
    config = dataclasses.replace(gpt.config, dtype="bfloat16")
    model = Transformer(config, rngs=nnx.Rngs(1))
    out = generate(model, [[1, 2]], SamplingConfig(max_new_tokens=4, temperature=0.0))
    assert out.tokens.shape == (1, 6)
    assert model.embed.tokens.embedding.get_value().dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": [[1, 50]]}, r"token id 50 is outside the model's vocabulary of 40"),
        (
            {"prompt": [[1, 2]], "attention_mask": [[1, 0]]},
            r"rows \[0\] of the prompt are padded on the right",
        ),
        ({"prompt": [[1, 2]], "attention_mask": [[1]]}, r"must be that of the prompt, \(1, 2\)"),
        ({"prompt": [1, 2]}, r"prompt of shape \(2,\)"),
        ({"prompt": [[1] * 30]}, r"has 32 positions; at most 2 new tokens fit"),
    ],
)
def test_bad_input_is_named(gpt, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(gpt, config=SamplingConfig(max_new_tokens=5, temperature=0.0), **arguments)


def test_sampling_without_a_key_is_an_error(gpt):
    with pytest.raises(ValueError, match="sampling needs a key"):
        generate(gpt, [[1]], SamplingConfig(max_new_tokens=1))


@pytest.mark.parametrize(
    "config",
    [
        bert(**TINY, max_length=8),
        vit(num_layers=1, d_model=16, num_heads=2, image_size=8, patch_size=4),
    ],
)
def test_models_that_cannot_generate_are_refused(config):
    model = Transformer(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="needs a causal model with a head named 'lm'"):
        generate(model, [[1]], SamplingConfig(temperature=0.0))


def test_left_pad():
    tokens, mask = left_pad([[1, 2, 3], [4]], pad_id=9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    with pytest.raises(ValueError, match="no row may be empty"):
        left_pad([[1], []])
