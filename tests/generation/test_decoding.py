"""Generation against the slow way: a full forward pass for each token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.generation import SamplingConfig, decode, generate, left_pad
from effscale.generation.checks import checked_key
from effscale.models import Transformer, bert, bloom, gpt2, gptj, llama, neox, opt, unroll, vit

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
    config = SamplingConfig(max_new_tokens=11, temperature=0.0, pad_token_id=1)
    whole = generate(gpt, tokens, config, attention_mask=mask)
    monkeypatch.setattr("effscale.generation.loop.STAGE_TOKENS", 2)
    # Another config, or the compiled function with the whole cache would be found again.
    grown = generate(gpt, tokens, dataclasses.replace(config, pad_token_id=2), attention_mask=mask)
    assert grown.tokens[:, 5:].tolist() == whole.tokens[:, 5:].tolist()


def test_a_row_ends_with_its_stop_token_and_the_others_go_on(gpt):
    greedy = SamplingConfig(max_new_tokens=10, temperature=0.0)
    tokens, mask = left_pad(PROMPTS)
    free = generate(gpt, tokens, greedy, attention_mask=mask)
    stop = int(free.tokens[0, tokens.shape[1] + 2])
    stopped = generate(
        gpt,
        tokens,
        dataclasses.replace(greedy, stop_token_ids=(stop,), pad_token_id=39),
        attention_mask=mask,
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
    config = SamplingConfig(
        max_new_tokens=20, temperature=0.0, stop_token_ids=(first,), pad_token_id=7
    )
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
        (
            {"prompt": [[1, 2]], "attention_mask": [[1]]},
            r"attention_mask must have the shape of the prompt, \(1, 2\), got",
        ),
        ({"prompt": [1, 2]}, r"prompt must have the shape \(batch, seq\).*, got \(2,\)"),
        ({"prompt": [[2**32 + 5]]}, r"token id 4294967301 is outside the model's vocabulary of 40"),
        ({"prompt": [[-1, 2]]}, r"token id -1 is outside the model's vocabulary of 40"),
        ({"prompt": [[1.7]]}, r"prompt must be an array of integers"),
        ({"prompt": [[True]]}, r"prompt must be an array of integers"),
        ({"prompt": [["a"]]}, r"prompt must be an array of integers"),
        ({"prompt": [[2**70]]}, r"prompt must be an array of integers"),
        ({"prompt": [[1], [1, 2]]}, r"Use left_pad to make one from lists of different lengths"),
        (
            {"prompt": np.zeros((0, 3), np.int32)},
            r"prompt must have the shape .* both at least 1, got \(0, 3\)",
        ),
        ({"prompt": [[]]}, r"prompt must have the shape .*, got \(1, 0\)"),
        ({"prompt": [[1] * 30]}, r"has 32 positions\. Set max_new_tokens to at most 2"),
    ],
)
def test_bad_input_is_named(gpt, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(gpt, config=SamplingConfig(max_new_tokens=5, temperature=0.0), **arguments)


@pytest.mark.parametrize("name", ["pad_token_id", "stop_token_ids"])
def test_ids_of_the_config_must_be_in_the_vocabulary(gpt, name):
    with pytest.raises(ValueError, match=rf"{name}.* 40 is outside the model's vocabulary of 40"):
        generate(gpt, [[1]], SamplingConfig(temperature=0.0, **{name: 40}))


def test_sampling_without_a_key_is_an_error(gpt):
    with pytest.raises(ValueError, match="sampling needs a key"):
        generate(gpt, [[1]], SamplingConfig(max_new_tokens=1))


@pytest.mark.parametrize(
    "key", [3, np.uint32(3), "key", jax.random.split(jax.random.key(0))], ids=str
)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(
        ValueError, match=r"key must be one PRNG key, got [\s\S]*\. Use jax\.random\.key"
    ):
        checked_key(key)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_keys_of_both_kinds_will_do(make):
    key = make(7)
    assert checked_key(key) is key


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_with_logits_that_are_not_finite_is_an_error(gpt, bad, temperature):
    config = SamplingConfig(max_new_tokens=4, temperature=temperature)
    broken = nnx.clone(gpt)
    table = broken.embed.tokens.embedding
    table[...] = table[...].at[7].set(bad)  # the head is tied: one logit of every row is bad
    with pytest.raises(ValueError, match=r"logits are NaN or infinite in row 0 .*dtype='float32'"):
        generate(broken, [[1, 2], [3, 4]], config, key=jax.random.key(0))


def test_generate_can_be_traced(gpt):
    config = SamplingConfig(max_new_tokens=3, temperature=0.0)
    tokens = jax.eval_shape(lambda model: generate(model, [[1, 2]], config).tokens, gpt)
    assert tokens.shape == (1, 5)


def test_log_probabilities_are_those_of_a_full_pass_at_the_temperature(gpt):
    tokens, mask = left_pad(PROMPTS)
    config = SamplingConfig(max_new_tokens=6, temperature=0.7, top_k=5, stop_token_ids=range(20))
    ask = lambda **options: generate(
        gpt, tokens, config, attention_mask=mask, key=jax.random.key(3), **options
    )
    out, plain = ask(log_probs=True), ask()
    assert plain.log_probs is None
    np.testing.assert_array_equal(plain.tokens, out.tokens)
    assert len(set(out.num_new.tolist())) > 1  # rows of different lengths
    whole = jax.nn.log_softmax(gpt(out.tokens, attention_mask=out.mask) / 0.7)
    for row, prompt in enumerate(PROMPTS):
        new, width = int(out.num_new[row]), tokens.shape[1]
        answer = out.tokens[row, width : width + new]
        wanted = whole[row, width - 1 : width - 1 + new][jnp.arange(new), answer]
        np.testing.assert_allclose(out.log_probs[row, :new], wanted, atol=1e-5, err_msg=str(prompt))
        assert not out.log_probs[row, new:].any()


def test_decode_is_part_of_a_compiled_loop_and_a_prepared_model_is_not_copied(gpt):
    config = SamplingConfig(max_new_tokens=3, temperature=0.0)
    prompt = jnp.array([[1, 2], [3, 4]])

    @jax.jit
    def twice(model, prompt):
        first = decode(model, prompt, config).tokens
        return decode(model, first, config).tokens

    ready = unroll(gpt)
    again = jax.tree.leaves(unroll(ready))
    assert all(a is b for a, b in zip(again, jax.tree.leaves(ready), strict=True))
    once = generate(gpt, prompt, config).tokens
    np.testing.assert_array_equal(twice(ready, prompt), generate(gpt, once, config).tokens)
    stacked, prepared = (
        decode.lower(model, prompt, config).compile().memory_analysis().temp_size_in_bytes
        for model in (gpt, ready)
    )
    copied = sum(a.nbytes for a in jax.tree.leaves(gpt.groups))
    assert stacked - prepared > 0.9 * copied


def test_decode_needs_a_key_to_sample(gpt):
    with pytest.raises(ValueError, match="sampling needs a key"):
        decode(gpt, jnp.array([[1]]), SamplingConfig(max_new_tokens=1))


@pytest.mark.parametrize(
    "config",
    [
        bert(**TINY, max_length=8),
        vit(num_layers=1, d_model=16, num_heads=2, image_size=8, patch_size=4),
    ],
)
def test_models_that_cannot_generate_are_refused(config):
    model = Transformer(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="model must be causal with a head named 'lm'"):
        generate(model, [[1]], SamplingConfig(temperature=0.0))


def test_left_pad():
    tokens, mask = left_pad([[1, 2, 3], [4]], pad_token_id=9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    rows = [np.array([1, 2, 3]), jnp.array([4])]
    assert left_pad(rows, pad_token_id=9)[0].tolist() == tokens.tolist()
    assert left_pad(np.array([[1, 2], [3, 4]]))[0].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("rows", "pad_token_id", "message"),
    [
        ([], 0, "at least one row"),
        ([[1], []], 0, r"row 1 must be a non-empty list of integers, got \[\]"),
        ([[1.7]], 0, r"row 0 must be a non-empty list of integers, got \[1\.7\]"),
        ([[1], 2], 0, r"row 1 must be a non-empty list of integers, got 2"),
        ([[1], [2**32 + 5]], 0, r"row 1: token id 4294967301 is outside int32"),
        ([[1]], 1.7, r"pad_token_id must be an integer, got 1\.7"),
    ],
)
def test_rows_that_cannot_be_padded_are_named(rows, pad_token_id, message):
    with pytest.raises(ValueError, match=message):
        left_pad(rows, pad_token_id)
