"""The actor while it generates: one set of weights, in a second layout that exists only meanwhile."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from effscale.generation import SamplingConfig
from effscale.models import Transformer, merge_lora, unroll
from effscale.parallel import DEFAULT_RULES, Rules, shardings, use_rules

ROLLOUT_RULES = DEFAULT_RULES | {"embed": None}
"""Weights lie whole along ``fsdp``, so that no token waits until they are gathered; along ``tensor`` they stay divided, as the cache is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are drawn.

    Example:
        >>> RolloutConfig(sampling=SamplingConfig(max_new_tokens=64, stop_ids=2)).sampling.stop_ids
        (2,)
    """

    sampling: SamplingConfig = SamplingConfig()
    """Length, temperature and stop tokens. Filters such as ``top_p`` make the policy that draws another than the one that learns: leave them off, unless
    you know why."""
    prepare: Callable[[Transformer], Transformer] | None = None
    """A last change to the weights, such as a quantization to INT8: a function from a model to a model, which is compiled."""
    mesh: Mesh | None = None
    """The devices; None: the actor lies on one."""
    rules: Rules = ROLLOUT_RULES
    """The layout on the mesh."""


@functools.partial(jax.jit, static_argnames="config")
def rollout_model(actor: Transformer, config: RolloutConfig) -> Transformer:
    """The actor as it generates: LoRA pairs merged, layers apart, laid out so that decoding is fast.

    It is a copy, made by one compiled function; drop it when the responses are there, so that training has the memory. The actor itself, and the base
    weights of its LoRA pairs, stay as they are.

    Args:
        actor: A policy as it is trained.
        config: Its layout.

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
