"""The same parameters under another config."""

from typing import Any

from flax import nnx

from effscale.models.config import TransformerConfig
from effscale.models.presets import abstract
from effscale.models.transformer import Transformer


def with_config(model: Transformer, config: TransformerConfig) -> Transformer:
    """A model with the same parameters that computes otherwise: in another type, with recomputed layers, another dropout.

    A model that comes from a file computes in the type of its parameters and keeps all activations. To train a large one, load it in float32, and let
    it compute in bfloat16 and recompute its layers in the backward pass.

    The parameters are shared with the model given: copy them (``jax.tree.map(jnp.copy, model)``) if you train both.

    Args:
        model: Any model of the library; its weights may be quantized or low-rank pairs.
        config: A variant of ``model.config`` that has the same parameters.

    Returns:
        A new model; the one given is untouched.

    Raises:
        ValueError: The config has other parameters: the first few are named.

    Example:
        >>> import dataclasses, jax
        >>> from effscale.models import gpt2
        >>> config = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> model = Transformer(config, rngs=nnx.Rngs(0))
        >>> lean = with_config(model, dataclasses.replace(config, dtype="bfloat16", remat="full"))
        >>> lean(jax.numpy.array([[3, 1, 4]])).dtype, lean.config.remat
        (dtype(bfloat16), 'full')
        >>> lean.embed.tokens.embedding.get_value().dtype
        dtype('float32')
    """
    graph, wanted = nnx.split(abstract(config))
    state = nnx.state(model)
    there, needed = _shapes(state), _shapes(wanted)
    if there != needed:
        names = sorted(
            name for name in there.keys() | needed.keys() if there.get(name) != needed.get(name)
        )
        told = ", ".join(
            f"{name} ({there.get(name, 'none')}, not {needed.get(name, 'none')})"
            for name in names[:5]
        )
        raise ValueError(
            f"config has other parameters than the model, {len(names)} of them, such as {told}"
        )
    return nnx.merge(graph, state)


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Of parameters by their names; a weight that is a pytree of its own has one, too."""
    return {
        ".".join(map(str, path)): tuple(variable.get_value().shape)
        for path, variable in nnx.to_flat_state(state)
    }
