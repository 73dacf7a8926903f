"""Use the same trunk with other heads."""

import copy
import dataclasses
import zlib
from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from effscale.models.config import HeadConfig
from effscale.models.heads import ClassHead
from effscale.models.transformer import Transformer


def replace_heads(
    model: Transformer, heads: Sequence[HeadConfig], *, key: PRNGKeyArray
) -> Transformer:
    """Return the model with these heads.

    A head that the model already has, with the same config or only another ``pool``, is kept. The others are initialized.

    The trunk's arrays are shared with ``model``. Copy them (``jax.tree.map(jnp.copy, model)``) if you train both.

    Args:
        model: Any model of the library.
        heads: The heads of the new model.
        key: Together with a head's name, determines the initial values of a new head.

    Returns:
        A new model; ``model`` is not changed.

    Example:
        >>> from effscale.models import ClassHead, gpt2
        >>> config = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> model = Transformer(config, rngs=nnx.Rngs(0))
        >>> score = ClassHead(num_classes=1, name="score", pool="none")
        >>> reward_model = replace_heads(model, [score], key=jax.random.key(1))
        >>> sorted(reward_model.heads)
        ['score']
    """
    config = dataclasses.replace(model.config, heads=tuple(heads))
    there = {head.name: head for head in model.config.heads}

    def build(head: HeadConfig) -> nnx.Module:
        old = there.get(head.name)
        if old == head:
            return model.heads[head.name]
        rngs = nnx.Rngs(jax.random.fold_in(key, zlib.crc32(head.name.encode())))
        new = head.build(config, rngs=rngs)
        both = isinstance(old, ClassHead) and isinstance(head, ClassHead)
        if both and dataclasses.replace(old, pool=head.pool) == head:
            nnx.update(new, nnx.state(model.heads[head.name]))
        return new

    new = copy.copy(model)
    new.heads = nnx.Dict({head.name: build(head) for head in config.heads})
    new.config = config
    return new
