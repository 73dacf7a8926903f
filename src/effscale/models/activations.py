"""Activation functions of published models, by name."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

Activation = Literal[
    "gelu",
    "gelu_tanh",
    "gelu_fast",
    "gelu_bloom",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "leaky_relu",
    "silu",
    "mish",
    "tanh",
    "sigmoid",
    "linear",
]


def _tanh_gelu(root: float) -> Callable[[Array], Array]:
    """Return the tanh approximation with a given rounding of sqrt(2/pi): trained models use several."""

    def gelu(x: Array) -> Array:
        return 0.5 * x * (1.0 + jnp.tanh(root * x * (1.0 + 0.044715 * x * x)))

    return gelu


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": _tanh_gelu(0.7978845608028654),
    "gelu_fast": _tanh_gelu(0.7978845608),
    "gelu_bloom": _tanh_gelu(0.79788456),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.01),
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}
"""The activation functions by the names that configs use."""
