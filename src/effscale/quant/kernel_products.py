"""Products of packed weights by the TPU and GPU kernels, where a kernel helps.

``docs/kernels.md`` explains which products are left to the compilers, and why.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effscale.models import finish
from effscale.models.activations import ACTIVATIONS, Activation
from effscale.quant.formats import Format
from effscale.quant.packing import stored_bits
from kernels_pallas import dispatch, packed_matmul, quantized_matmul
from kernels_pallas.packed_matmul.api import why_not as why_not_packed
from kernels_pallas.quantized_matmul.api import why_not as why_not_quantized

if TYPE_CHECKING:
    from effscale.quant.packed import PackedWeight

_TOKENS = (Format(granularity="token"), Format(granularity="token", symmetric=False))
"""The input formats that the kernel supports."""


def kernel_serves(x: Float[Array, "rows d_in"], weight: "PackedWeight") -> bool:
    """Return whether a kernel should compute the product on the machine that the program is compiled for.

    A kernel for 8-bit products quantizes its inputs itself. Left to the compilers are quantized inputs in other
    formats, asymmetric weights with quantized inputs, and tables that are used as tables. So are 8-bit weights with
    one scale per output and float inputs, which compilers convert to floats inside the product on their own.
    """
    name = dispatch.accelerator()
    plain = weight.is_table or weight.format.floating or weight.data.ndim != 2
    if name is None or plain or x.dtype not in (jnp.float32, jnp.bfloat16):
        return False
    grouped, bits = weight.format.granularity == "group", stored_bits(weight.format.bits)
    if weight.activations is None:
        scale, _ = _of_groups(weight)
        gain = grouped or bits < 8
        return gain and why_not_packed(name, x, weight.data, scale, bits) is None
    as_in_kernel = weight.activations in _TOKENS and weight.input_scale is None
    served = as_in_kernel and not grouped and weight.zero is None
    return served and why_not_quantized(name, x, weight.data, bits) is None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def kernel_product(
    activation: Activation | None,
    x: Float[Array, "rows d_in"],
    bias: Float[Array, " d_out"] | None,
    weight: "PackedWeight",
) -> Float[Array, "rows d_out"]:
    """Compute ``activation(x W + b)`` with a kernel. The gradient passes to ``x`` as if neither ``x`` nor the weight had been rounded."""
    within = None if activation is None else _WITHIN.get(activation)
    scale, zero = _of_groups(weight)
    options: dict[str, Any] = {"bits": stored_bits(weight.format.bits), "activation": within}
    if weight.activations is None:
        y = packed_matmul(x, weight.data, scale, zero, bias, **options)
    else:
        y = quantized_matmul(x, weight.data, scale[0], bias, weight.sums, **options)
    y = y.astype(weight.compute)
    return y if within is not None or activation is None else ACTIVATIONS[activation](y)


def _forward(activation: Activation | None, x: Array, bias: Any, weight: Any) -> tuple[Array, Any]:
    y = kernel_product(None, x, None, weight)
    out, pullback = jax.vjp(lambda y, bias: finish(y, bias, activation), y, bias)
    return out, (pullback, weight, x)


def _backward(activation: Activation | None, saved: Any, gradient: Array) -> tuple[Any, ...]:
    del activation
    pullback, weight, x = saved
    of_y, of_bias = pullback(gradient)
    of_x = of_y.astype(weight.compute) @ weight.dense().mT
    return of_x.astype(x.dtype), of_bias, None


kernel_product.defvjp(_forward, _backward)


def _of_groups(weight: "PackedWeight") -> tuple[Array, Array | None]:
    """Return scales and zero points, ``(groups, out)``."""
    d_out = weight.data.shape[0]

    def spread(a: Array | None) -> Array | None:
        if a is None or weight.format.granularity == "group":
            return a
        return jnp.repeat(a.reshape(-1), d_out // a.size)[None]

    scale = spread(weight.scale)
    assert scale is not None
    return jax.lax.stop_gradient((scale, spread(weight.zero)))


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

_WITHIN: dict[Activation, Callable[[Array], Array]] = {
    **{name: ACTIVATIONS[name] for name in _AS_THEY_ARE},
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x * 0.5**0.5)),
    "relu": lambda x: jnp.maximum(x, 0.0),
    "relu2": lambda x: jnp.square(jnp.maximum(x, 0.0)),
    "relu6": lambda x: jnp.clip(x, 0.0, 6.0),
}
"""The activations that kernels fuse, in operations that Pallas supports on TPUs and GPUs. Others run as a separate pass."""
