"""The actor during generation: the same weights in a second layout that exists only for that time."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from effscale.generation import SamplingConfig
from effscale.models import Transformer, merge_lora, unroll
from effscale.options import Options
from effscale.parallel import DEFAULT_RULES, shardings, use_rules
from effscale.parallel.rules import Rules

ROLLOUT_RULES = DEFAULT_RULES | {"embed": None}
"""Weights are replicated along ``fsdp``, so that no token waits for them to be gathered; along ``tensor`` they stay sharded, like the cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig(Options):
    """Options of response generation.

    Example:
        >>> RolloutConfig(sampling=SamplingConfig(max_new_tokens=64, stop_token_ids=2)).sampling.stop_token_ids
        (2,)
    """

    sampling: SamplingConfig = SamplingConfig()
    """Length, temperature and stop tokens. Filters such as ``top_p`` make the sampling policy differ from the policy being trained, so leave
    them off unless you know why you need them."""
    prepare: Callable[[Transformer], Transformer] | None = None
    """A final transformation of the weights, such as quantization to INT8: a function from a model to a model, which is compiled."""
    mesh: Mesh | None = None
    """The device mesh; None if the actor is on one device."""
    rules: Rules = ROLLOUT_RULES
    """Sharding rules of the weights on the mesh."""


@functools.partial(jax.jit, static_argnames="config")
def rollout_model(actor: Transformer, config: RolloutConfig) -> Transformer:
    """Return the actor in its layout for generation: LoRA pairs merged, layers unstacked, weights sharded.

    It is a copy, made by one compiled function; drop it after generation to free the memory for training. The actor
    and the base weights of its LoRA pairs are unchanged.

    Args:
        actor: The policy in training.
        config: Options of the generation layout.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from effscale.generation import decode
        >>> from effscale.models import gpt2
        >>> tiny = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> actor = Transformer(tiny, rngs=nnx.Rngs(0))
        >>> config = RolloutConfig(sampling=SamplingConfig(max_new_tokens=4))
        >>> model = rollout_model(actor, config)
        >>> decode(model, jnp.array([[3, 1, 4]]), config.sampling, key=jax.random.key(0)).tokens.shape
        (1, 7)
    """
    model = merge_lora(actor)
    if config.prepare is not None:
        model = config.prepare(model)
    model = unroll(model)
    if config.mesh is None:
        return model
    with use_rules(config.rules):
        return jax.lax.with_sharding_constraint(model, shardings(model, config.mesh))
