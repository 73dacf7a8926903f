"""Scores of continuations, answers and texts against logits of one row at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from effscale.data import train_tokenizer
from effscale.evaluation import (
    continuations,
    pass_at_k,
    rank_answers,
    ranking,
    score_continuations,
    text_log_probs,
)
from effscale.models import MLPConfig, Transformer, bloom, gpt2
from effscale.moe import MoEConfig, RouterConfig, with_experts

VOCAB = 50


@pytest.fixture(scope="module", params=["gpt2", "bloom"])
def model(request):
    shape = {"num_layers": 2, "d_model": 16, "num_heads": 2, "vocab_size": VOCAB}
    config = bloom(**shape) if request.param == "bloom" else gpt2(**shape, max_length=96)
    config = dataclasses.replace(config, init_std=0.3)  # far from a uniform choice
    return jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()


def expected(model, context, continuation):
    """By the logits of the row alone."""
    ids = jnp.array([[*context, *continuation][:-1]])
    log_probs = np.asarray(jax.nn.log_softmax(model(ids).astype(jnp.float32)))[0]
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    said = [log_probs[place, token] for place, token in zip(places, continuation, strict=True)]
    greedy = [log_probs[p].argmax() == t for p, t in zip(places, continuation, strict=True)]
    return sum(said), all(greedy)


def likeliest(model, context, count):
    ids = list(context)
    for _ in range(count):
        ids.append(int(model(jnp.array([ids]))[0, -1].argmax()))
    return ids[len(context) :]


def test_rows_of_all_lengths(model):
    """Padding, order and company change nothing."""
    rng = np.random.default_rng(0)
    draw = lambda count: rng.integers(0, VOCAB, count).tolist()
    contexts = [draw(count) for count in (1, 3, 40, 7, 60)]
    after = [draw(1), likeliest(model, contexts[1], 3), draw(12), draw(2), draw(9)]
    found = score_continuations(model, contexts, after, batch_size=2)
    each = [expected(model, c, a) for c, a in zip(contexts, after, strict=True)]
    np.testing.assert_allclose(found.log_probs, [score for score, _ in each], atol=2e-4)
    assert found.greedy.tolist() == [greedy for _, greedy in each]
    assert found.greedy[1]
    assert not found.greedy.all()
    assert found.cut == 0


def test_any_callable_pytree_is_a_model():
    """A table of bigrams, and an nnx module, whose scores are those of their logits."""
    table = jax.random.normal(jax.random.key(0), (VOCAB, VOCAB))
    bigrams = jax.tree_util.Partial(lambda table, ids: table[ids], table)
    module = nnx.Embed(VOCAB, VOCAB, rngs=nnx.Rngs(1))
    contexts, after = [[3, 1, 4], [2]], [[1, 5, 9], [7]]
    for model in (bigrams, module):
        found = score_continuations(model, contexts, after)
        scores = [expected(model, c, a) for c, a in zip(contexts, after, strict=True)]
        np.testing.assert_allclose(found.log_probs, [score for score, _ in scores], atol=1e-5)
    total = text_log_probs(bigrams, [contexts[0]], bos_token_id=0, max_length=2)
    np.testing.assert_allclose(total[0], expected(bigrams, [0], contexts[0])[0], atol=1e-5)


def test_a_long_context_loses_its_beginning(model):
    context, after = list(range(30)), [7, 8]
    found = score_continuations(model, [context], [after], max_length=10)
    # Ten tokens are read: nine of the context, and the first of the continuation.
    score, _ = expected(model, context[-9:], after)
    np.testing.assert_allclose(found.log_probs[0], score, atol=2e-4)
    assert found.cut == 1


def test_padding_stays_within_the_positions():
    """A model of 40 positions reads a row of 40, where the next shape would be 64."""
    config = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=VOCAB, max_length=40)
    model = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    found = score_continuations(model, [list(range(49))], [[5]])
    score, _ = expected(model, list(range(9, 49)), [5])
    np.testing.assert_allclose(found.log_probs[0], score, atol=1e-4)
    assert found.cut == 1


def test_few_shapes_are_compiled():
    padded = {continuations.padded(count, 32) for count in range(1, 2049)}
    assert len(padded) == 12
    assert all(continuations.padded(n, 32) >= n for n in range(1, 2049))


@settings(deadline=None, max_examples=15)
@given(length=st.integers(1, 40), window=st.integers(1, 12))
def test_every_token_of_a_text_is_predicted_once(length, window):
    """With the windows of the model that says of each token how many lie before it in its window."""
    seen = []

    def record(model, contexts, continuations, **options):
        for context, continuation in zip(contexts, continuations, strict=True):
            assert len(context) + len(continuation) - 1 <= window
            seen.extend(continuation)
        return continuations_scores(len(contexts))

    continuations_scores = lambda count: continuations.ContinuationScores(
        np.ones(count, np.float32), np.zeros(count, bool), 0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effscale.evaluation.texts.score_continuations", record)
        total = text_log_probs.__wrapped__(
            None, [list(range(1, length + 1))], bos_token_id=0, max_length=window
        )
    assert seen == list(range(1, length + 1))
    assert total.tolist() == [-(-length // window)]


def test_texts_longer_than_the_model_reads(model):
    """By hand: of 11 tokens in windows of 4 the last three are read from the eighth on, with a token before."""
    text = np.random.default_rng(1).integers(0, VOCAB, 11).tolist()
    ids = [0, *text]
    windows = [(ids[:1], ids[1:5]), (ids[4:5], ids[5:9]), (ids[7:9], ids[9:12])]
    by_hand = sum(expected(model, *window)[0] for window in windows)
    found = text_log_probs(model, [text, text[:4]], bos_token_id=0, max_length=4)
    np.testing.assert_allclose(found, [by_hand, expected(model, [0], text[:4])[0]], atol=5e-4)


def test_answers_are_ranked():
    texts = ["Is it so? yes no maybe not at all"] * 3
    tokenizer = train_tokenizer(texts, vocab_size=270)
    config = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=270, max_length=64)
    config = dataclasses.replace(config, init_std=0.3)
    model = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    prompts, answers = (
        ["Is it so?", "Is it not so? "],
        [[" yes", " no", " maybe not"], ["no", "yes"]],
    )
    found = rank_answers(model, tokenizer, prompts, answers)
    ids = lambda text: tokenizer.encode(text).ids
    for number, (prompt, choices) in enumerate(zip(prompts, answers, strict=True)):
        begin = ids(prompt.rstrip())
        scores = [
            expected(model, begin, ids(prompt + answer)[len(begin) :])[0] for answer in choices
        ]
        np.testing.assert_allclose(found.log_probs[number], scores, atol=2e-4)
        assert found.best[number] == np.argmax(scores)
    by_byte = rank_answers(model, tokenizer, prompts, answers, normalize="byte")
    np.testing.assert_allclose(by_byte.log_probs[0], found.log_probs[0] / [4, 3, 10], rtol=1e-6)


class Merging:
    """A tokenizer that has a token across the end of a prompt."""

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return list(map(ord, text.replace("ab", "\x01")))


@pytest.mark.parametrize(
    ("prompt", "answer", "context", "continuation"),
    [
        ("\x02a", "b\x03", [2], [1, 3]),
        ("\x02a", "\x03", [2, 97], [3]),
        ("\x02 ", "\x03", [2], [32, 3]),
        ("\x02ab", "b", [2, 1], [98]),
    ],
)
def test_where_an_answer_begins(prompt, answer, context, continuation):
    """With the first token that the prompt alone does not have."""
    assert ranking._divided(Merging(), prompt, answer) == (context, continuation)


def test_a_prompt_without_a_token_of_its_own(model):
    with pytest.raises(
        ValueError, match=r"prompt 0 has no token before its answers.* Pass bos_token_id"
    ):
        rank_answers(model, Merging(), ["a"], [["b"]])
    assert rank_answers(model, Merging(), ["a"], [["b", "\x05"]], bos_token_id=0).best.shape == (1,)
    assert rank_answers(model, Merging(), [], []).log_probs == []


def test_programs_that_pass():
    """By drawing all pairs of five, of which two pass."""
    passes = [False, True, False, True, False]
    pairs = [passes[i] or passes[j] for i in range(5) for j in range(i)]
    np.testing.assert_allclose(pass_at_k(5, 2, 2), np.mean(pairs))
    assert (pass_at_k(5, 0, 3), pass_at_k(5, 3, 3)) == (0.0, 1.0)
    for wrong in ((5, 2, 6), (5, 2, 0), (5, 6, 1)):
        with pytest.raises(ValueError, match="must be from"):
            pass_at_k(*wrong)


def test_bad_input(model):
    for contexts, after, message in (
        ([[1]], [[]], "the continuation of item 0 is empty"),
        ([[1], []], [[1], [2]], "the context of item 1 is empty"),
        ([[1]], [], "one entry for each of the 1 contexts, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            score_continuations(model, contexts, after)
    with pytest.raises(ValueError, match="at most max_length=4 tokens, got 5"):
        score_continuations(model, [[1]], [[1, 2, 3, 4, 5]], max_length=4)
    with pytest.raises(ValueError, match="text 0 is empty"):
        text_log_probs(model, [[]], bos_token_id=0, max_length=4)
    with pytest.raises(ValueError, match="prompt 0 has no answers"):
        rank_answers(model, None, ["a"], [[]])


def test_experts_that_see_later_tokens_are_refused():
    router = RouterConfig(k=1, chosen_by="experts")
    moe = MoEConfig(num_experts=2, expert=MLPConfig(d_ff=16), router=router)
    config = with_experts(gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50), moe)
    model = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    with pytest.raises(ValueError, match="chosen_by='experts'"):
        score_continuations(model, [[1, 2]], [[3]])
