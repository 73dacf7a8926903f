"""What generation is given by hand, checked before anything is compiled."""

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
    """The prompt as an array, or an error that says what is wrong with it, the config's ids or the model."""
    inputs = model.config.inputs
    if not (model.config.causal and "lm" in model.heads and isinstance(inputs, TokenInputs)):
        raise ValueError("generate needs a causal model with a head named 'lm'")
    ids = integers(prompt)
    if ids is None:
        raise ValueError(
            "prompt must be an array of integers of shape (batch, seq); left_pad makes one from lists of different lengths"
        )
    if ids.ndim != 2 or ids.size == 0:
        raise ValueError(f"prompt of shape {ids.shape}: must be (batch, seq), both at least 1")
    vocabulary = f"the model's vocabulary of {inputs.vocab_size}"
    check_ids(ids, inputs.vocab_size, vocabulary)
    biased = [token for token, _ in config.biases]
    for name, some in (
        ("pad_id", [config.pad_id]),
        ("stop_ids:", config.stop_ids),
        ("logit_bias:", biased),
    ):
        check_ids(np.array(some), inputs.vocab_size, vocabulary, name=name)
    total, limit = ids.shape[1] + config.max_new_tokens, model.config.max_length
    if limit is not None and total > limit:
        raise ValueError(
            f"a prompt of {ids.shape[1]} and max_new_tokens={config.max_new_tokens} make {total} tokens, but the model "
            f"has {limit} positions; at most {max(limit - ids.shape[1], 0)} new tokens fit"
        )
    return ids.astype(np.int32)


def checked_mask(
    attention_mask: Any, tokens: Int[np.ndarray, "batch seq"]
) -> Bool[np.ndarray, "batch seq"]:
    """The mask as an array; all true where there is none."""
    if attention_mask is None:
        return np.ones(tokens.shape, bool)
    mask = np.asarray(attention_mask).astype(bool)
    if mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask of shape {mask.shape}: must be that of the prompt, {tokens.shape}"
        )
    if not mask[:, -1].all():
        rows = np.flatnonzero(~mask[:, -1])[:5].tolist()
        raise ValueError(
            f"rows {rows} of the prompt are padded on the right or empty; pad on the left (see left_pad)"
        )
    return mask


def checked_key(key: Any) -> PRNGKeyArray | None:
    """The key, or an error that says what a key is; None stays None."""
    if key is None:
        return None
    try:
        single = jax.random.key_data(key).ndim == 1
    except TypeError:
        single = False
    if not single:
        raise ValueError(f"key={key!r}: must be one PRNG key; use jax.random.key(0)")
    return key


def checked_processors(processors: Iterable[Any]) -> tuple[LogitsProcessor, ...]:
    """The processors as a tuple, or an error that names one that cannot be called or hashed."""
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
                f"processors: {processor!r} must be a function (logits, history) -> logits that can be hashed"
            )
    return found


def refuse_failures(
    failed: Bool[Array, "batch"] | Bool[np.ndarray, "batch"],
    model: Transformer,
    config: SamplingConfig,
    processors: tuple[LogitsProcessor, ...],
) -> None:
    """Raises a ValueError that names the first row whose logits were of no use."""
    if not failed.any():
        return
    row = int(failed.argmax()) // config.num_return_sequences
    also = (
        "; or no token was left that may follow (logit_bias, no_repeat_ngram_size, min_new_tokens, processors)"
        if may_forbid_all(config, processors)
        else ""
    )
    raise ValueError(
        f"the model's logits are NaN or infinite in row {row} of the prompt; check its weights, and "
        f"that its activations fit dtype={model.config.dtype!r}{also}"
    )
