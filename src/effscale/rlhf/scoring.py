"""Evaluate models on given responses: log-probabilities, values and scores.

A batch has the tokens of prompt and response, padded on the left to prompts of equal length and on the right to
responses of equal length, with a mask that is true at real tokens, as returned by ``effscale.generation.decode``.
Dropout is off unless a key is given.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effscale.models import Transformer, matmul
from effscale.models.weights import transpose
from effscale.options import PositiveFloat, checked
from kernels_pallas.cross_entropy.chunked import chunk_size, split_tokens

CHUNK = 512
"""Number of tokens whose logits are in memory at the same time."""


class ResponseLogProbs(NamedTuple):
    """The result of ``response_log_probs``.

    Attributes:
        log_probs: Log-probability of each token, in nats; undefined where the mask is false.
        entropies: Entropy of the distribution at each token, in nats.
        reports: Values reported by layers, such as the auxiliary loss of routers; see
            ``effscale.training.add_reports``.
    """

    log_probs: Float[Array, "batch response"]
    entropies: Float[Array, "batch response"]
    reports: Any


def response_log_probs(
    model: Transformer,
    tokens: Int[Array, "batch total"],
    mask: Bool[Array, "batch total"],
    response: int,
    *,
    temperature: float = 1.0,
    key: PRNGKeyArray | None = None,
) -> ResponseLogProbs:
    """Compute the log-probabilities of the tokens of responses, and the entropy of the distribution at each of them.

    Logits are computed only for the response, in chunks, in float32. For tokens that ``effscale.generation.decode``
    sampled from the same model at the same temperature, the log-probabilities equal those that it returned.

    Args:
        model: A causal model with a head named ``lm``.
        tokens: Prompts and responses.
        mask: True at real tokens.
        response: Length of the responses including padding: the number of last tokens.
        temperature: The sampling temperature, by which logits are divided.
        key: Turns on dropout.

    Returns:
        Log-probabilities, entropies, and the reports of the model's layers.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from effscale.models import gpt2
        >>> tiny = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> model = Transformer(tiny, rngs=nnx.Rngs(0))
        >>> tokens = jnp.arange(6)[None]
        >>> response_log_probs(model, tokens, tokens >= 0, response=2).log_probs.shape
        (1, 2)
    """
    _check(tokens, response)
    temperature = checked("temperature", temperature, PositiveFloat)
    encoded = model.encode(tokens, attention_mask=mask, key=key)
    hidden = encoded.hidden[:, -response - 1 : -1]
    x, weight, bias = model.heads["lm"].linear(hidden, model.embed)
    table = transpose(weight)

    def of_chunk(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        x, labels = inputs
        logits = matmul(x, table, bias).astype(jnp.float32) / temperature
        log_probs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[:, None], 1)[:, 0]
        return chosen, -(jnp.exp(log_probs) * log_probs).sum(1)

    labels = tokens[:, -response:]
    rows = x.reshape(-1, x.shape[-1])
    chunk = chunk_size(rows.shape[0], CHUNK)
    chunks = split_tokens(rows, chunk), split_tokens(labels.reshape(-1), chunk)
    # The backward pass begins with the head and reuses the logits of a single chunk from the forward pass.
    one = chunks[0].shape[0] == 1
    found = jax.lax.map(of_chunk if one else jax.checkpoint(of_chunk), chunks)
    # A chunk has every n-th token.
    shaped = lambda a: a.swapaxes(0, 1).reshape(-1)[: labels.size].reshape(labels.shape)
    return ResponseLogProbs(shaped(found[0]), shaped(found[1]), encoded.reports)


def response_values(
    critic: Transformer,
    tokens: Int[Array, "batch total"],
    mask: Bool[Array, "batch total"],
    response: int,
    *,
    head: str = "value",
    key: PRNGKeyArray | None = None,
) -> Float[Array, "batch response"]:
    """Compute the value before each token of the responses: the critic's prediction given the prompt and the previous tokens.

    Args:
        critic: A causal model with a head of one class and ``pool="none"``.
        tokens: Prompts and responses.
        mask: True at real tokens.
        response: Length of the responses, including padding.
        head: Name of the head.
        key: Turns on dropout.
    """
    return values_and_reports(critic, tokens, mask, response, head=head, key=key)[0]


def values_and_reports(
    critic: Transformer,
    tokens: Int[Array, "batch total"],
    mask: Bool[Array, "batch total"],
    response: int,
    *,
    head: str,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "batch response"], Any]:
    """Return the result of ``response_values``, and the reports of the critic's layers."""
    _check(tokens, response)
    encoded = critic.encode(tokens, attention_mask=mask, key=key)
    outputs = head_outputs(critic, encoded.hidden, mask, head, key)
    if outputs.ndim != 3:
        raise ValueError(
            f"the critic's head {head!r} must return one value per token, got the shape {outputs.shape}. Use ClassHead(num_classes=1, pool='none')"
        )
    return outputs[:, -response - 1 : -1, 0].astype(jnp.float32), encoded.reports


def response_scores(
    reward_model: Transformer,
    tokens: Int[Array, "batch total"],
    mask: Bool[Array, "batch total"],
    *,
    head: str = "score",
) -> Float[Array, "batch"]:
    """Compute the score of each response as a whole: the one at its last token.

    Args:
        reward_model: A causal model with a head of one class, ``pool="last"`` or ``pool="none"``.
        tokens: Prompts and responses.
        mask: True at real tokens.
        head: Name of the head.
    """
    hidden = reward_model.encode(tokens, attention_mask=mask).hidden
    return at_last(head_outputs(reward_model, hidden, mask, head, None), mask)


def at_last(outputs: Array, mask: Bool[Array, "batch total"]) -> Float[Array, "batch"]:
    """Return a head's value for each row, in float32; for values per token, the one at the last real token."""
    if outputs.ndim == 3:
        place = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
        last = jnp.where(mask, place, 0).max(1)
        outputs = jnp.take_along_axis(outputs, last[:, None, None], 1)[:, 0]
    return outputs[:, 0].astype(jnp.float32)


def head_outputs(
    model: Transformer,
    hidden: Float[Array, "batch total d_model"],
    mask: Bool[Array, "batch total"],
    head: str,
    key: PRNGKeyArray | None,
) -> Array:
    """Return the output of a head with one class, for each row or for each token.

    Raises:
        ValueError: The model has no such head, or the head has more classes.
    """
    outputs = model.outputs(hidden, mask, key)
    if not isinstance(outputs, dict) or head not in outputs:
        raise ValueError(
            f"head must be one of the model's heads, {sorted(model.heads)}, got {head!r}"
        )
    found = outputs[head]
    if found.shape[-1] != 1:
        raise ValueError(
            f"the head {head!r} must return one number for a score or value, got {found.shape[-1]}. Use ClassHead(num_classes=1)"
        )
    return found


def _check(tokens: Any, response: int) -> None:
    if not 1 <= response < tokens.shape[1]:
        raise ValueError(
            f"response must be at least 1 and leave a prompt in the {tokens.shape[1]} tokens, got {response}"
        )
