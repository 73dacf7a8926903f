"""Validation of the arguments of generation, before anything is compiled."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from effscale.generation.config import SamplingConfig
from effscale.generation.processors import LogitsProcessor, may_forbid_all
from effscale.generation.prompts import check_ids, integers
from effscale.models import TokenInputs, Transformer


def checked_prompt(
    model: Transformer, prompt: Any, config: SamplingConfig
) -> Int[np.ndarray, "batch seq"]:
    """Return the prompt as an array, or raise an error about the prompt, the ids in the config, or the model."""
    inputs = model.config.inputs
    if not (model.config.causal and "lm" in model.heads and isinstance(inputs, TokenInputs)):
        raise ValueError(
            f"model must be causal with a head named 'lm', got causal={model.config.causal} and the heads {list(model.heads)}"
        )
    ids = integers(prompt)
    if ids is None:
        raise ValueError(
            f"prompt must be an array of integers of shape (batch, seq), got {prompt!r:.80}. "
            "Use left_pad to make one from lists of different lengths"
        )
    if ids.ndim != 2 or ids.size == 0:
        raise ValueError(
            f"prompt must have the shape (batch, seq), both at least 1, got {ids.shape}"
        )
    vocabulary = f"the model's vocabulary of {inputs.vocab_size}"
    check_ids(ids, inputs.vocab_size, vocabulary)
    biased = [token for token, _ in config.biases]
    for name, some in (
        ("pad_token_id", [config.pad_token_id]),
        ("stop_token_ids:", config.stop_token_ids),
        ("logit_bias:", biased),
    ):
        check_ids(np.array(some), inputs.vocab_size, vocabulary, name=name)
    total, limit = ids.shape[1] + config.max_new_tokens, model.config.max_length
    if limit is not None and total > limit:
        raise ValueError(
            f"a prompt of {ids.shape[1]} tokens and max_new_tokens={config.max_new_tokens} make {total} tokens, but the model "
            f"has {limit} positions. Set max_new_tokens to at most {max(limit - ids.shape[1], 0)}"
        )
    return ids.astype(np.int32)


def checked_mask(
    attention_mask: Any, tokens: Int[np.ndarray, "batch seq"]
) -> Bool[np.ndarray, "batch seq"]:
    """Return the mask as an array; without a mask, all entries are true."""
    if attention_mask is None:
        return np.ones(tokens.shape, bool)
    mask = np.asarray(attention_mask).astype(bool)
    if mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask must have the shape of the prompt, {tokens.shape}, got {mask.shape}"
        )
    if not mask[:, -1].all():
        rows = np.flatnonzero(~mask[:, -1])[:5].tolist()
        raise ValueError(
            f"rows {rows} of the prompt are padded on the right or empty. Pad on the left (see left_pad)"
        )
    return mask


def checked_key(key: Any) -> PRNGKeyArray | None:
    """Return the key, or raise an error unless it is one PRNG key; None stays None."""
    if key is None:
        return None
    try:
        single = jax.random.key_data(key).ndim == 1
    except TypeError:
        single = False
    if not single:
        raise ValueError(f"key must be one PRNG key, got {key!r}. Use jax.random.key(0)")
    return key


def checked_processors(processors: Iterable[Any]) -> tuple[LogitsProcessor, ...]:
    """Return the processors as a tuple, or raise an error that names one that cannot be called or hashed."""
    found = tuple(processors)
    for processor in found:
        try:
            hash(processor)
        except TypeError:
            usable = False
        else:
            usable = callable(processor)
        if not usable:
            raise ValueError(
                f"processors must be hashable functions (logits, history) -> logits, got {processor!r}"
            )
    return found


def refuse_failures(
    failed: Bool[Array, "batch"] | Bool[np.ndarray, "batch"],
    model: Transformer,
    config: SamplingConfig,
    processors: tuple[LogitsProcessor, ...],
) -> None:
    """Raise a ValueError that names the first row with unusable logits."""
    if not failed.any():
        return
    row = int(failed.argmax()) // config.num_return_sequences
    also = (
        "; or every token was excluded (logit_bias, no_repeat_ngram_size, min_new_tokens, processors)"
        if may_forbid_all(config, processors)
        else ""
    )
    raise ValueError(
        f"the model's logits are NaN or infinite in row {row} of the prompt. Check its weights, and "
        f"that its activations fit in dtype={model.config.dtype!r}{also}"
    )
