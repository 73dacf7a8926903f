"""Autoregressive generation: one prefill, then one compiled loop over a cache."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from effscale.generation.config import SamplingConfig
from effscale.generation.loop import Carry, Constants, Plan, advance, answered, begin, ready, stages
from effscale.generation.processors import LogitsProcessor
from effscale.models import Transformer
from effscale.models.cache import grow_cache


@typing.no_type_check  # JAX also builds it from shapes and placeholders
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """The result of ``effscale.generation.decode`` and ``effscale.generation.generate``.

    With ``num_return_sequences=n``, the ``n`` answers to a prompt are ``n`` consecutive rows.

    Attributes:
        tokens: Prompt and answer; ``pad_token_id`` after the end of a row.
        mask: True at the real tokens of the prompt and at the tokens of the answer, including its stop token.
        num_new: Length of each answer, including its stop token.
        failed: Whether a row ended because its logits became NaN or infinite, or because every token was excluded.
        log_probs: Log-probability of each new token under ``softmax(logits / temperature)`` (temperature 1 if greedy),
            before penalties and filters, in float32; 0 after the end of a row. None unless requested.
        logits: The model's logits for each new token, in float32; 0 after the end of a row. None unless requested.
        scores: The logits after penalties, biases, processors, temperature and filters; each new token was drawn from their
            softmax. Minus infinity at excluded tokens. None unless requested.
    """

    tokens: Int[Array, "batch total"]
    mask: Bool[Array, "batch total"]
    num_new: Int[Array, "batch"]
    failed: Bool[Array, "batch"]
    log_probs: Float[Array, "batch new"] | None = None
    logits: Float[Array, "batch new vocab"] | None = None
    scores: Float[Array, "batch new vocab"] | None = None


@jax.jit(static_argnames=("config", "processors", "log_probs", "logits", "scores"))
def decode(
    model: Transformer,
    prompt: Int[Array, "batch seq"],
    config: SamplingConfig,
    *,
    attention_mask: Shaped[Array, "batch seq"] | None = None,
    key: PRNGKeyArray | None = None,
    processors: tuple[LogitsProcessor, ...] = (),
    log_probs: bool = False,
    logits: bool = False,
    scores: bool = False,
) -> Generated:
    """Continue each row of a prompt on the devices, without the checks of ``effscale.generation.generate``.

    Nothing is transferred to the host, so you can call it inside a compiled loop, such as that of reinforcement learning.
    Token ids must be within the vocabulary, and padding must be on the left.

    Decoding needs the weights of each layer as separate arrays, so a stacked model is copied at each call. To copy it only
    once, pass ``effscale.models.unroll(model)``.

    Args:
        model: A causal model with a head named ``lm``.
        prompt: Token ids.
        config: Length, filters and stop tokens.
        attention_mask: Nonzero at real tokens; None: all are real.
        key: Key for sampling; optional if greedy.
        processors: Custom functions ``(logits, history) -> logits``, applied before the temperature; see
            ``effscale.generation.processors.History``. They are part of the compiled program, so another function compiles again.
        log_probs: Whether to return the log-probabilities of the new tokens, which costs one pass over the logits per token.
        logits: Whether to return the logits: ``batch * max_new_tokens * vocab`` numbers.
        scores: Whether to return the scores that the tokens were drawn from, which are equally large.

    Returns:
        Tokens, masks and lengths; see ``effscale.generation.Generated``.

    Raises:
        ValueError: While tracing: ``key`` is missing, the prompt and ``max_new_tokens`` exceed the model's positions, or a
            processor does not return logits.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2, unroll
        >>> tiny = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=32)
        >>> model = unroll(Transformer(tiny, rngs=nnx.Rngs(0)))
        >>> greedy = SamplingConfig(max_new_tokens=5, temperature=0.0)
        >>> decode(model, jnp.array([[3, 1, 4]]), greedy, log_probs=True).log_probs.shape
        (1, 5)
    """
    mask = jnp.ones(prompt.shape) if attention_mask is None else attention_mask
    mask = mask.astype(bool)
    plan = Plan(
        config=config, processors=processors, log_probs=log_probs, logits=logits, scores=scores
    )
    constants, carry = begin(ready(model), prompt, mask, key_for(config, key), plan)
    length = prompt.shape[1]
    for end in stages(length, config.max_new_tokens):
        carry = carry._replace(cache=grow_cache(carry.cache, end))
        carry = advance(constants, carry, end - length, plan)
    return gathered(constants, carry)


def key_for(config: SamplingConfig, key: PRNGKeyArray | None) -> PRNGKeyArray:
    """Return the key, or an arbitrary one if nothing is drawn."""
    if key is not None:
        return key
    if not config.greedy:
        raise ValueError("sampling needs a key. Pass key=jax.random.key(0), or set temperature=0")
    return jax.random.key(0)


def gathered(constants: Constants, carry: Carry) -> Generated:
    """Return the tokens drawn so far, in the form that the caller sees."""
    length = constants.mask.shape[1]
    new = answered(carry, carry.tokens.shape[1] - length)
    return Generated(
        tokens=carry.tokens,
        mask=jnp.concatenate([constants.mask, new], 1),
        num_new=carry.num_new,
        failed=carry.failed,
        log_probs=carry.log_probs,
        logits=carry.logits,
        scores=carry.scores,
    )
