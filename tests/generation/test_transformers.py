"""Options against transformers: the same file and weights give the same scores and tokens."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.generation import SamplingConfig, answer_texts, generate
from effscale.generation.processors import (
    History,
    add_bias,
    forbid_repeated_ngrams,
    keep_min_p,
    process,
    warp,
)
from effscale.interop import sampling_from_folder

torch = pytest.importorskip("torch", reason="the oracle is transformers")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

VOCAB, NEW = 300, 12
PROMPT = np.array([[3, 5, 3, 5, 9, 3], [8, 8, 8, 1, 2, 8]], np.int32)
STOPS = list(range(20, 40))


@pytest.fixture(scope="module")
def gpt():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.3
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def ours(gpt, tmp_path_factory):
    from effscale.interop import load_pretrained

    folder = tmp_path_factory.mktemp("gpt")
    gpt.save_pretrained(folder)
    return load_pretrained(folder)


def theirs(gpt, prompt=PROMPT, **options):
    torch.manual_seed(1)
    return gpt.generate(
        torch.tensor(prompt, dtype=torch.long),
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **options,
    )


def replayed(out, config, length):
    """Our scores of each step that they took, from their logits."""
    sequences = jnp.asarray(out.sequences.numpy(), jnp.int32)
    total = sequences.shape[1]

    @jax.jit
    def scores(logits, step):
        filled = length + step
        mask = jnp.broadcast_to(jnp.arange(total)[None] < filled, sequences.shape)
        seen = None
        if config.repetition_penalty != 1:
            rows = jnp.arange(sequences.shape[0])[:, None]
            seen = jnp.zeros(logits.shape, bool).at[rows, sequences].max(mask)
        history = History(sequences, mask, step, filled)
        return warp(process(logits, history, config, seen=seen), config)

    return [scores(jnp.asarray(x.numpy()), jnp.int32(i)) for i, x in enumerate(out.logits)]


@pytest.mark.parametrize(
    "fields",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
        {"do_sample": True, "temperature": 1.5, "top_k": 0, "min_p": 0.3, "min_new_tokens": 4},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "top_p": 0.5},
        {"no_repeat_ngram_size": 3, "suppress_tokens": [8, 11], "min_length": 10},
        {
            "do_sample": True,
            "repetition_penalty": 0.6,
            "no_repeat_ngram_size": 1,
            "suppress_tokens": [1],
            "min_new_tokens": 3,
            "temperature": 1.3,
            "top_k": 30,
            "top_p": 0.9,
            "min_p": 0.02,
        },
    ],
    ids=lambda fields: "+".join(fields),
)
def test_a_generation_config_gives_the_scores_that_transformers_gives(gpt, fields, tmp_path):
    given = transformers.GenerationConfig(
        **fields, max_new_tokens=NEW, eos_token_id=STOPS, pad_token_id=0
    )
    # As text: transformers refuses to save a field that it does not use.
    (tmp_path / "generation_config.json").write_text(json.dumps(given.to_dict()))
    config = sampling_from_folder(tmp_path, prompt_length=PROMPT.shape[1])
    out = theirs(gpt, generation_config=given)
    ours = replayed(out, config, PROMPT.shape[1])
    assert len(ours) == len(out.scores) > 3
    finished = np.zeros(2, bool)
    for step, (mine, wanted) in enumerate(zip(ours, out.scores, strict=True)):
        np.testing.assert_allclose(
            mine[~finished], wanted.numpy()[~finished], rtol=1e-5, err_msg=f"step {step}"
        )
        finished |= np.isin(out.sequences[:, PROMPT.shape[1] + step], STOPS)


def test_what_transformers_writes_by_default_is_all_known(tmp_path):
    fields = transformers.GenerationConfig().to_dict()
    # Not null but what they stand for, where transformers says it.
    fields |= {"do_sample": True, "top_k": 50, "num_beams": 1, "typical_p": 1.0, "eta_cutoff": 0.0}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    assert sampling_from_folder(tmp_path) == SamplingConfig(top_k=50)


def test_greedy_tokens_logits_and_scores_with_every_option(gpt, ours):
    options = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 6}
    stops = list(range(20, 160))
    bias = {7: -4.0, 12: 3.5, 50: -math.inf}
    config = SamplingConfig(
        **options,
        max_new_tokens=NEW,
        temperature=0.0,
        stop_token_ids=stops,
        logit_bias=bias,
        pad_token_id=0,
    )
    out = theirs(
        gpt,
        **options,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=0,
        sequence_bias={(token,): value for token, value in bias.items()},
    )
    found = generate(ours, PROMPT, config, logits=True, scores=True)
    steps = len(out.scores)
    wanted = np.pad(out.sequences.numpy(), ((0, 0), (0, NEW - steps)))
    np.testing.assert_array_equal(found.tokens, wanted)
    assert 6 <= found.num_new.min() < NEW
    for name, rows in (("logits", out.logits), ("scores", out.scores)):
        mine = np.asarray(getattr(found, name))
        for row, new in enumerate(found.num_new.tolist()):
            theirs_of_row = np.stack([x.numpy()[row] for x in rows[:new]])
            np.testing.assert_allclose(mine[row, :new], theirs_of_row, atol=2e-4, err_msg=name)
            assert not mine[row, new:].any()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_repeated_ngrams(size):
    tokens = np.random.default_rng(size).integers(0, 3, (4, 9)).astype(np.int32)
    logits = np.zeros((4, 5), np.float32)

    @jax.jit
    def ours(filled):
        mask = jnp.broadcast_to(jnp.arange(9)[None] < filled, tokens.shape)
        history = History(jnp.asarray(tokens), mask, jnp.int32(0), filled)
        return forbid_repeated_ngrams(jnp.asarray(logits), history, size)

    for filled in range(1, 10):
        wanted = transformers.NoRepeatNGramLogitsProcessor(size)(
            torch.tensor(tokens[:, :filled]), torch.tensor(logits)
        )
        np.testing.assert_array_equal(ours(jnp.int32(filled)), wanted.numpy())


@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_min_p_with_ties(p):
    logits = (np.random.default_rng(3).integers(0, 12, (5, 30)) / 3).astype(np.float32)
    wanted = transformers.MinPLogitsWarper(p)(None, torch.tensor(logits)).numpy()
    np.testing.assert_array_equal(keep_min_p(jnp.asarray(logits), p), wanted)


def test_biases():
    logits = np.random.default_rng(4).normal(size=(2, 6)).astype(np.float32)
    wanted = transformers.SequenceBiasLogitsProcessor({(2,): 1.5, (4,): -math.inf})(
        torch.zeros((2, 1), dtype=torch.long), torch.tensor(logits)
    )
    mine = add_bias(jnp.asarray(logits), ((2, 1.5), (4, -math.inf)))
    np.testing.assert_allclose(mine, wanted.numpy(), rtol=1e-6)


def test_rows_end_with_the_token_that_completes_a_stop_string(gpt, ours):
    from effscale.data import train_tokenizer

    text = "the stop string begins within a token and ends in another one of these tokens "
    fast = train_tokenizer([text * 9], vocab_size=VOCAB)
    short = [i for i in range(VOCAB) if len(fast.decode([i])) < 2]
    config = SamplingConfig(
        max_new_tokens=NEW,
        temperature=0.0,
        pad_token_id=0,
        logit_bias=dict.fromkeys(short, -math.inf),
    )
    free = generate(ours, PROMPT, config)
    texts = answer_texts(fast, free)
    # From within one token to within the next, for each row.
    strings = []
    for row, third in zip(np.asarray(free.tokens), (3, 5), strict=True):
        answer = row[PROMPT.shape[1] :].tolist()
        end = len(fast.decode(answer[:third]))
        strings.append(fast.decode(answer)[end - 1 : end + 1])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=fast)
    wanted = gpt.generate(
        torch.tensor(PROMPT, dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        suppress_tokens=short,
        stop_strings=strings,
        tokenizer=wrapped,
    ).numpy()
    found = generate(ours, PROMPT, config, stop_strings=strings, tokenizer=fast, log_probs=True)
    np.testing.assert_array_equal(found.tokens[:, : wanted.shape[1]], wanted)
    assert found.num_new.min() < found.num_new.max() < NEW
    for row, new in enumerate(found.num_new.tolist()):
        assert not found.tokens[row, PROMPT.shape[1] + new :].any()
        assert not found.log_probs[row, new:].any()
        begins = min(at for s in strings if (at := texts[row].find(s)) >= 0)
        for tokenizer in (fast, wrapped):
            mine = answer_texts(tokenizer, found, stop_strings=strings)[row]
            assert mine == texts[row][:begins]
