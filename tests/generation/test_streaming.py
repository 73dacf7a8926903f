"""Tokens and text as they come, own processors, several answers: against `decode` and whole texts."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from effscale.data import train_tokenizer
from effscale.generation import (
    SamplingConfig,
    answer_texts,
    decode,
    generate,
    left_pad,
    stream,
    stream_text,
)
from effscale.generation.checks import checked_processors
from effscale.generation.decoding import Generated
from effscale.generation.text import AnswerText
from effscale.models import Transformer, gpt2, unroll

TEXT = "Some words, a naïve café, 東京 and 🙂 again; then some words more. "
TOKENIZER = train_tokenizer([TEXT * 5], vocab_size=300)
PROMPTS = [[3, 14, 15, 9, 2], [6, 5], [35]]
SAMPLING = SamplingConfig(max_new_tokens=11, stop_token_ids=range(40), pad_token_id=7)


@pytest.fixture(scope="module")
def gpt():
    config = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=300, max_length=64)
    config = dataclasses.replace(config, init_std=0.4)
    return unroll(Transformer(config, rngs=nnx.Rngs(1)))


@pytest.mark.parametrize("chunk", [1, 4, 99])
def test_a_stream_yields_what_is_generated_at_once(gpt, chunk, monkeypatch):
    # Three sizes of the cache, whose edges lie within chunks.
    monkeypatch.setattr("effscale.generation.loop.STAGE_TOKENS", 3)
    tokens, mask = left_pad(PROMPTS)
    given = {"attention_mask": mask, "key": jax.random.key(2), "log_probs": True}
    whole = generate(gpt, tokens, SAMPLING, **given)
    assert 1 <= whole.num_new.min() < whole.num_new.max() <= 11
    drawn = stream(gpt, tokens, SAMPLING, chunk=chunk, **given)
    chunks = list(drawn)
    assert {part.tokens.shape[1] for part in chunks[:-1]} <= {chunk}
    longest = int(whole.num_new.max())
    parts = (np.concatenate(part, 1) for part in zip(*chunks, strict=True))
    for part, wanted in zip(parts, (whole.tokens, whole.mask), strict=True):
        np.testing.assert_array_equal(part, wanted[:, tokens.shape[1] :][:, :longest])
    jax.tree.map(np.testing.assert_array_equal, drawn.generated(), whole)
    assert list(drawn) == []


def test_a_row_that_is_stopped_is_cut_and_the_others_go_on(gpt):
    tokens, mask = left_pad(PROMPTS)
    config = dataclasses.replace(SAMPLING, stop_token_ids=())
    given = {"attention_mask": mask, "key": jax.random.key(2), "scores": True}
    whole = generate(gpt, tokens, config, **given)
    drawn = stream(gpt, tokens, config, chunk=4, **given)
    next(drawn)
    early = drawn.generated()
    drawn.stop(1, 3)
    rest = list(drawn)
    assert [part.mask[:, 0].tolist() for part in rest] == [[True, False, True]] * 2
    out = drawn.generated()
    assert early.num_new.tolist() == [4, 4, 4]
    assert out.num_new.tolist() == [11, 3, 11]
    assert out.tokens[1, 8:].tolist() == [7] * 8
    assert not out.scores[1, 3:].any()
    kept = np.asarray(out.mask)
    np.testing.assert_array_equal(out.tokens[kept], whole.tokens[kept])
    np.testing.assert_array_equal(out.scores[0], whole.scores[0])


def test_a_stream_holds_no_copy_of_a_prepared_model(gpt):
    drawn = stream(gpt, [[1, 2, 3]], SAMPLING, key=jax.random.key(2))
    where = lambda model: [a.unsafe_buffer_pointer() for a in jax.tree.leaves(model)]
    assert where(drawn._constants.model) == where(gpt)


def test_several_answers_are_those_to_prompts_that_are_repeated(gpt):
    tokens, mask = left_pad(PROMPTS)
    config = dataclasses.replace(
        SAMPLING, num_return_sequences=2, repetition_penalty=1.2, no_repeat_ngram_size=2
    )
    out = generate(gpt, tokens, config, attention_mask=mask, key=jax.random.key(5))
    repeated = generate(
        gpt,
        np.repeat(tokens, 2, 0),
        dataclasses.replace(config, num_return_sequences=1),
        attention_mask=np.repeat(mask, 2, 0),
        key=jax.random.key(5),
    )
    jax.tree.map(np.testing.assert_array_equal, out, repeated)
    assert out.tokens.shape == (6, 16)
    assert (out.tokens[::2] != out.tokens[1::2]).any()


def test_processors_see_what_the_rows_hold_and_act_before_the_temperature(gpt):
    """One that lets each row count upwards from its number of tokens, and one that doubles logits."""

    def counting(logits, history):
        wanted = history.mask.sum(1, keepdims=True) + 10 * history.step
        last = history.tokens[jnp.arange(3), history.filled - 1]
        wanted = wanted + 0 * last[:, None]
        return jnp.where(jnp.arange(logits.shape[1])[None] == wanted, logits, -jnp.inf)

    def doubling(logits, history):
        return 2 * logits

    tokens, mask = left_pad(PROMPTS)
    config = SamplingConfig(max_new_tokens=3, temperature=0.5, top_k=20)
    given = {"attention_mask": mask, "key": jax.random.key(0), "logits": True, "scores": True}
    out = generate(gpt, tokens, config, processors=[counting, doubling], **given)
    assert out.tokens[:, 5:].tolist() == [[5, 16, 27], [2, 13, 24], [1, 12, 23]]
    at = jnp.asarray(out.tokens)[:, 5:, None]
    pick = lambda a: np.take_along_axis(a, at, 2)
    np.testing.assert_allclose(pick(out.scores), 4 * pick(out.logits), rtol=1e-6)
    assert (np.isfinite(out.scores).sum(2) == 1).all()


def test_processors_that_give_no_logits_are_named(gpt):
    config = SamplingConfig(max_new_tokens=2, temperature=0.0)
    narrow = lambda logits, history: logits[:, :5]
    with pytest.raises(
        ValueError,
        match=r"the processor <lambda> must return logits of shape \(1, 300\), got \(1, 5\)",
    ):
        generate(gpt, [[1]], config, processors=[narrow])
    with pytest.raises(ValueError, match=r"processors must be hashable functions .*, got 3"):
        checked_processors([3])
    nothing = lambda logits, history: logits - jnp.inf
    with pytest.raises(
        ValueError, match=r"row 0 of the prompt.* every token was excluded .*processors"
    ):
        generate(gpt, [[1]], config, processors=[nothing])


@hypothesis.given(
    st.lists(st.integers(0, 299), max_size=12), st.lists(st.integers(0, 299), max_size=12)
)
def test_pieces_are_whole_characters_and_make_the_whole_text(prompt, answer):
    text = AnswerText(TOKENIZER, prompt)
    pieces = []
    for token in answer:
        text.add(token)
        pieces.append(text.take())
        assert not pieces[-1].endswith("\ufffd")
    text.end()
    pieces.append(text.take())
    before, whole = TOKENIZER.decode(prompt), TOKENIZER.decode(prompt + answer)
    if not before.endswith("\ufffd"):
        assert "".join(pieces) == whole[len(before) :]


@hypothesis.given(
    st.text(alphabet="wor é東", max_size=30),
    st.lists(st.text(alphabet="wor é東", min_size=1), max_size=3),
)
def test_a_stop_string_ends_the_text_and_no_piece_shows_its_beginning(text, stops):
    ids = TOKENIZER.encode(text).ids
    answer = AnswerText(TOKENIZER, stop_strings=stops)
    pieces, needed = [], None
    for count, token in enumerate(ids, 1):
        if answer.add(token) and needed is None:
            needed = count
        pieces.append(answer.take())
    answer.end()
    pieces.append(answer.take())
    whole = [TOKENIZER.decode(ids[:count]) for count in range(len(ids) + 1)]
    holds = [count for count, part in enumerate(whole) if any(stop in part for stop in stops)]
    assert needed == min(holds, default=None)
    if holds:
        part = whole[holds[0]]
        assert answer.text == part[: min(at for stop in stops if (at := part.find(stop)) >= 0)]
    else:
        assert answer.text == text
    assert "".join(pieces) == answer.text


def test_words_come_whole():
    answer = AnswerText(TOKENIZER)
    pieces = []
    for token in TOKENIZER.encode(TEXT + "end").ids:
        answer.add(token)
        pieces.append(answer.take(words=True))
    answer.end()
    pieces.append(answer.take(words=True))
    said = [piece for piece in pieces if piece]
    assert "".join(said) == TEXT + "end"
    # The last of these comes before the white space after it.
    assert said[:5] == ["Some ", "words, ", "a ", "naïve ", "café, 東京"]
    assert said[-1] == "end"


def test_the_space_before_an_answer_is_kept_where_decoders_drop_the_first_one():
    words = {"▁a": 0, "▁b": 1, "c": 2, "</s>": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="c"))
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    row = jnp.asarray([[3, 0, 1, 2, 3]])
    mask = jnp.asarray([[False, True, True, True, True]])
    out = Generated(row, mask, jnp.asarray([3]), jnp.asarray([False]))
    assert answer_texts(tokenizer, out) == [" bc"]
    assert answer_texts(tokenizer, out, skip_special_tokens=False) == [" bc</s>"]
    assert answer_texts(tokenizer, out, stop_strings="c") == [" b"]


def test_streamed_text_is_that_of_the_whole_answer(gpt):
    config = SamplingConfig(max_new_tokens=11, logit_bias={295: -math.inf})
    key = jax.random.key(3)
    prompt = TOKENIZER.encode("Some words").ids
    whole = decode(gpt, jnp.asarray([prompt]), config, key=key)
    text = answer_texts(TOKENIZER, whole)[0]
    for words in (True, False):
        pieces = list(
            stream_text(gpt, TOKENIZER, "Some words", config, key=key, chunk=4, words=words)
        )
        assert "".join(pieces) == text
        assert all(pieces)
    stop = text[6:8]
    cut = stream_text(gpt, TOKENIZER, prompt, config, key=key, chunk=4, stop_strings=stop)
    assert "".join(cut) == text[: text.index(stop)]


def test_bad_arguments_are_named(gpt):
    config = SamplingConfig(max_new_tokens=2, num_return_sequences=2)
    with pytest.raises(ValueError, match="num_return_sequences must be 1 for stream_text, got 2"):
        stream_text(gpt, TOKENIZER, "a", config, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"chunk must be an integer of at least 1, got 0"):
        stream(gpt, [[1]], SAMPLING, key=jax.random.key(0), chunk=0)
    with pytest.raises(ValueError, match=r"stop_strings=\('a',\) needs a tokenizer"):
        generate(gpt, [[1]], SAMPLING, key=jax.random.key(0), stop_strings="a")
    with pytest.raises(ValueError, match="stop_strings must be non-empty strings, got ''"):
        AnswerText(TOKENIZER, stop_strings=[""])
    with pytest.raises(ValueError, match="logit_bias: 300 is outside the model's vocabulary"):
        generate(gpt, [[1]], SamplingConfig(temperature=0.0, logit_bias={300: 1.0}))
