"""Use the same parameters with another config."""

from typing import Any

from flax import nnx

from effscale.models.config import TransformerConfig
from effscale.models.presets import abstract_model
from effscale.models.transformer import Transformer


def with_config(model: Transformer, config: TransformerConfig) -> Transformer:
    """Return a model with the same parameters under another config: another dtype, rematerialization or dropout.

    A model loaded from a file computes in the dtype of its parameters and keeps all activations. To train a large one,
    load it in float32, then let it compute in bfloat16 and recompute its layers in the backward pass.

    The new model shares its parameters with ``model``. Copy them (``jax.tree.map(jnp.copy, model)``) if you train both.

    Args:
        model: Any model of the library; its weights may be quantized or low-rank pairs.
        config: A variant of ``model.config`` with the same parameters.

    Returns:
        A new model; ``model`` is not changed.

    Raises:
        ValueError: The config has different parameters; the message names the first few.

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
    graph, wanted = nnx.split(abstract_model(config))
    state = nnx.state(model)
    there, needed = _shapes(state), _shapes(wanted)
    if there != needed:
        names = sorted(
            name for name in there.keys() | needed.keys() if there.get(name) != needed.get(name)
        )
        examples = ", ".join(
            f"{name} ({there.get(name, 'none')}, not {needed.get(name, 'none')})"
            for name in names[:5]
        )
        raise ValueError(
            f"config must have the parameters of the model, but {len(names)} differ, such as {examples}"
        )
    return nnx.merge(graph, state)


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters by name; a structured weight has a shape, too."""
    return {
        ".".join(map(str, path)): tuple(variable.get_value().shape)
        for path, variable in nnx.to_flat_state(state)
    }
