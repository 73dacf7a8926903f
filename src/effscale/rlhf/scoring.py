"""What models say of responses that are there: log-probabilities, values, scores.

A batch is tokens of prompt and response, padded on the left to prompts of equal length and on the right to responses of equal length, with a
mask that is true at real tokens, as ``effscale.generation.decode`` returns it. All is without dropout unless a key is given.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effscale.models import Transformer, matmul, transpose
from kernels_pallas.cross_entropy.chunked import chunk_size, split_tokens

CHUNK = 512
"""Tokens whose logits exist at a time."""


class ResponseLogProbs(NamedTuple):
    """What ``response_log_probs`` returns.

    Attributes:
        log_probs: Of each token, in nats; of no meaning where the mask is false.
        entropies: Of the choice at each token, in nats.
        reports: What layers reported, such as the auxiliary loss of routers; see ``effscale.training.add_reports``.
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
    """Log-probabilities of the tokens of responses, and the entropy of the choice at each of them.

    Logits are computed for the response alone, a part at a time, in float32. For tokens that ``effscale.generation.decode`` has drawn from the
    same model at the same temperature, the log-probabilities are those that it told.

    Args:
        model: A causal model with a head named ``lm``.
        tokens: Prompts and responses.
        mask: True at real tokens.
        response: Length of the responses, padding included: the last so many tokens.
        temperature: What logits are divided by; that of the sampling.
        key: Turns dropout on.

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
    # The backward pass begins with the head: it finds the logits of a single chunk as the forward pass left them.
    one = chunks[0].shape[0] == 1
    found = jax.lax.map(of_chunk if one else jax.checkpoint(of_chunk), chunks)
    # A chunk has every so-manieth token.
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
    """The value before each token of the responses: what a critic expects after the prompt and the tokens before.

    Args:
        critic: A causal model with a head of one class and ``pool="none"``.
        tokens: Prompts and responses.
        mask: True at real tokens.
        response: Length of the responses, padding included.
        head: Name of the head.
        key: Turns dropout on.
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
    """What ``response_values`` returns, and the reports of the critic's layers."""
    _check(tokens, response)
    encoded = critic.encode(tokens, attention_mask=mask, key=key)
    outputs = head_outputs(critic, encoded.hidden, mask, head, key)
    if outputs.ndim != 3:
        raise ValueError(
            f"the critic's head {head!r} gives {outputs.shape}: a critic has ClassHead(num_classes=1, pool='none')"
        )
    return outputs[:, -response - 1 : -1, 0].astype(jnp.float32), encoded.reports


def response_scores(
    reward_model: Transformer,
    tokens: Int[Array, "batch total"],
    mask: Bool[Array, "batch total"],
    *,
    head: str = "score",
) -> Float[Array, "batch"]:
    """The score of each response as a whole: that at its last token.

    Args:
        reward_model: A causal model with a head of one class, ``pool="last"`` or ``pool="none"``.
        tokens: Prompts and responses.
        mask: True at real tokens.
        head: Name of the head.
    """
    hidden = reward_model.encode(tokens, attention_mask=mask).hidden
    return at_last(head_outputs(reward_model, hidden, mask, head, None), mask)


def at_last(outputs: Array, mask: Bool[Array, "batch total"]) -> Float[Array, "batch"]:
    """A head's number for each row, or of numbers for each token that at the last real one, in float32."""
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
    """What a head of one class says, of each row or of each token.

    Raises:
        ValueError: The model has no such head, or it has more classes.
    """
    outputs = model.outputs(hidden, mask, key)
    if not isinstance(outputs, dict) or head not in outputs:
        raise ValueError(f"the model has no head {head!r}; its heads are {sorted(model.heads)}")
    found = outputs[head]
    if found.shape[-1] != 1:
        raise ValueError(
            f"the head {head!r} gives {found.shape[-1]} numbers: a score or value is one; use ClassHead(num_classes=1)"
        )
    return found


def _check(tokens: Any, response: int) -> None:
    if not 1 <= response < tokens.shape[1]:
        raise ValueError(
            f"response={response}: must be at least 1 and leave a prompt of the {tokens.shape[1]} tokens"
        )
