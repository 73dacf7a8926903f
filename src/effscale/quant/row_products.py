"""Multiply a single row of codes by packed weights, as in decoding at batch 1, in operations that CPUs vectorize.

XLA's CPU backend has no fast integer product for one row, and it writes the planes of packed codes to memory before
it multiplies them. Here the loop over an output's bytes is unrolled, ``LANES`` inputs at a time. XLA fuses this into
one loop that reads each byte of the weight once and keeps the sums in registers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int8, Int32

from effscale.models.activations import ACTIVATIONS, Activation
from effscale.quant.formats import stored_bits
from kernels_pallas import dispatch
from kernels_pallas.packed_codes import unpack_planes

LANES = 32
"""Number of inputs that are multiplied at the same time; more do not fit into registers with older compilers."""

TERMS = 128
"""Products in one iteration of a loop. With more, newer compilers no longer keep them in registers."""


def serves_row(rows: int, data: Int8[Array, "*stack d_out bytes"], bits: int) -> bool:
    """Return whether ``row_product`` is the fastest for ``rows`` rows and these codes on the machine that the program
    is compiled for.

    Codes of 8 bits are left to the compiler, whose product of four rows is faster.
    """
    packed = stored_bits(bits) < 8 and data.ndim == 2 and data.shape[-1] % LANES == 0
    return rows == 1 and packed and dispatch.platform() == "cpu" and not dispatch.auto_partitioned()


def row_product(
    x: Int8[Array, "1 d_in"], data: Int8[Array, "d_out bytes"], bits: int
) -> Int32[Array, "1 d_out"]:
    """Compute exact sums of products of codes.

    Args:
        x: Codes of 8 bits.
        data: Packed codes, as in ``effscale.quant.qarrays``.
        bits: Bits of a packed code, fewer than 8.
    """
    bits = stored_bits(bits)
    planes = 8 // bits
    # Without this, codes are unpacked once before a decoding loop and read as 16 bits inside it.
    x, data = jax.lax.optimization_barrier((x.astype(jnp.int16), data))
    width = data.shape[1]
    inputs = x.reshape(planes, 1, width)
    # The products of this number of bytes sum within 16 bits.
    together = (2**15 - 1) // (128 * planes * 2 ** (bits - 1))
    lanes = [slice(start, start + LANES) for start in range(0, width, LANES)]
    loops = -(-len(lanes) * planes // TERMS)
    parts = []
    for loop in range(loops):
        sums = []
        for lane in lanes[loop * len(lanes) // loops : (loop + 1) * len(lanes) // loops]:
            codes = unpack_planes(data[:, lane].astype(jnp.int16), bits)
            products = [c * inputs[plane, :, lane] for plane, c in enumerate(codes)]
            sums.append(sum(products[1:], products[0]))
        steps = range(0, len(sums), together)
        wider = [sum(sums[i + 1 : i + together], sums[i]).astype(jnp.int32) for i in steps]
        # The barrier keeps the sum over lanes, which CPUs do not vectorize, out of the loop.
        parts.append(jax.lax.optimization_barrier(sum(wider[1:], wider[0])))
    return jnp.sum(sum(parts[1:], parts[0]), axis=1)[None]


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
