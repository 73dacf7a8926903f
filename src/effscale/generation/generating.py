"""The friendly face of generation: checks what it is given and what comes out."""

from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from effscale.generation.decoding import Generated, decode
from effscale.generation.prompts import check_ids, integers
from effscale.generation.sampling import SamplingConfig
from effscale.models import TokenInputs, Transformer


def generate(
    model: Transformer,
    prompt: Any,
    config: SamplingConfig | None = None,
    *,
    attention_mask: Any = None,
    key: PRNGKeyArray | None = None,
    log_probs: bool = False,
) -> Generated:
    """Continues each row of ``prompt``, after checking it, and checks what comes out.

    Args:
        model: A causal model with a head named ``lm``. If you call this often, give ``effscale.models.unroll(model)``; see
            :func:`decode`.
        prompt: Token ids of shape ``(batch, seq)``, padded on the left; :func:`left_pad` makes one from lists.
        config: Length, filters and stop tokens.
        attention_mask: ``(batch, seq)``, nonzero at real tokens; None: all are real.
        key: For sampling; may be left out only when greedy. The same key gives the same tokens, and a row's tokens
            do not depend on the other rows.
        log_probs: Whether to return the new tokens' log-probabilities.

    Returns:
        Tokens of shape ``(batch, seq + max_new_tokens)``, their mask, and each answer's length; see :class:`Generated`.

    Raises:
        ValueError: If the model is not causal or has no ``lm`` head; the prompt is not an array of integers, holds an
            id outside the vocabulary, is empty or padded on the right, or leaves too few positions for the answer;
            ``key`` is missing or not a PRNG key; or the model's logits become NaN or infinite.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2
        >>> tiny = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=32)
        >>> model = Transformer(tiny, rngs=nnx.Rngs(0))
        >>> out = generate(model, [[3, 1, 4]], SamplingConfig(max_new_tokens=5, temperature=0.0))
        >>> out.tokens.shape
        (1, 8)
    """
    config = SamplingConfig() if config is None else config
    tokens = _checked_prompt(model, prompt, config)
    mask = _checked_mask(attention_mask, tokens)
    generated = decode(
        model, tokens, config, attention_mask=mask, key=checked_key(key), log_probs=log_probs
    )
    # Inside a jit of the caller's there is no value to look at yet.
    if not isinstance(generated.failed, jax.core.Tracer) and generated.failed.any():
        raise ValueError(
            f"the model's logits are NaN or infinite in row {int(generated.failed.argmax())} of the prompt; check its weights, and "
            f"that its activations fit dtype={model.config.dtype!r}"
        )
    return generated


def _checked_prompt(model: Transformer, prompt: Any, config: SamplingConfig) -> np.ndarray:
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
    check_ids(np.array([config.pad_id]), inputs.vocab_size, vocabulary, name="pad_id")
    check_ids(np.array(config.stop_ids), inputs.vocab_size, vocabulary, name="stop_ids:")
    total, limit = ids.shape[1] + config.max_new_tokens, model.config.max_length
    if limit is not None and total > limit:
        raise ValueError(
            f"a prompt of {ids.shape[1]} and max_new_tokens={config.max_new_tokens} make {total} tokens, but the model "
            f"has {limit} positions; at most {max(limit - ids.shape[1], 0)} new tokens fit"
        )
    return ids.astype(np.int32)


def _checked_mask(attention_mask: Any, tokens: np.ndarray) -> np.ndarray:
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
