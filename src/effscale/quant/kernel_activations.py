"""Activations in operations that Pallas supports on TPUs and GPUs, so that kernels can fuse them."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from effscale.models.activations import ACTIVATIONS, Activation


def _erf(x: Array) -> Array:
    """Compute the error function as a quotient of polynomials, since not every kernel backend has it; within 2e-7 of XLA's."""
    x = jnp.clip(x, -4.0, 4.0)
    square = x * x
    above, below = (_polynomial(square, numbers) for numbers in (_ERF_ABOVE, _ERF_BELOW))
    return x * above / below


def _polynomial(x: Array, coefficients: tuple[float, ...]) -> Array:
    y = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = y * x + coefficient
    return y


_ERF_ABOVE = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_BELOW = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)

_AS_THEY_ARE = ("gelu_tanh", "gelu_fast", "gelu_bloom", "quick_gelu", "silu", "tanh", "sigmoid")

WITHIN: dict[Activation, Callable[[Array], Array]] = {
    **{name: ACTIVATIONS[name] for name in _AS_THEY_ARE},
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x * 0.5**0.5)),
    "relu": lambda x: jnp.maximum(x, 0.0),
    "relu2": lambda x: jnp.square(jnp.maximum(x, 0.0)),
    "relu6": lambda x: jnp.clip(x, 0.0, 6.0),
}
"""The activations that kernels fuse. Others run as a separate pass."""
