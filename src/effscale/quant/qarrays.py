"""Convert between packed weights and qwix's ``QArray``."""

import typing

import jax
import jax.numpy as jnp
import numpy as np

from effscale.extras import require
from effscale.quant.formats import Format, unpack
from effscale.quant.packed import PackedWeight, check_packable, pack_quantized
from effscale.quant.quantizers import Quantized

if typing.TYPE_CHECKING:
    from qwix import QArray

TYPES = {8: "int8", 4: "int4", 3: "int4", 2: "int2"}


def to_qarray(weight: PackedWeight) -> "QArray":
    """Convert a packed kernel to a ``QArray`` of qwix.

    Args:
        weight: A kernel ``(..., in, out)``, or a stack of kernels, in integers of 2 bits or more or in float8.

    Returns:
        Codes in the shape of the kernel, with a scale that has the same number of dimensions.

    Raises:
        ValueError: qwix has no such format: one bit, an embedding table, or a zero point that is not an integer
            multiple of the scale.
        ImportError: qwix is not installed.

    Example:
        >>> from effscale.quant import Format, pack_weight
        >>> kernel = jax.random.normal(jax.random.key(0), (64, 32))
        >>> array = to_qarray(pack_weight(kernel, Format(bits=4, granularity="group", group_size=16)))
        >>> array.qvalue.shape, array.scale.shape
        ((64, 32), (4, 32))
    """
    QArray = _qarray()
    format = weight.format
    if weight.is_table:
        raise ValueError("weight must be a kernel, got an embedding table. Use its transpose")
    if format.bits == 1:
        raise ValueError(
            "weight must have 2 bits or more, got one bit: qwix has no one-bit codes -1 and 1"
        )
    codes = weight.data if format.floating else unpack(weight.data, format.bits)
    kind = "float8_e4m3fn" if format.floating else TYPES[format.bits]
    scale, zero = _spread(weight.scale, weight), None
    if weight.zero is not None:
        if not format.integer_zero:
            raise ValueError(
                "weight must have zero points that are integer multiples of its scales. Quantize with Format(integer_zero=True)"
            )
        zero = -jnp.round(_spread(weight.zero, weight) / scale)
        low, high = -(2 ** (format.bits - 1)), 2 ** (format.bits - 1) - 1
        if not bool(jnp.all((zero >= low) & (zero <= high))):
            raise ValueError(
                f"a zero point does not fit into {kind}: zero is not in the range of a group"
            )
        zero = zero.astype(kind)
    return QArray(codes.mT.astype(kind), scale, zero, kind)


def from_qarray(
    array: "QArray", *, activations: Format | None = None, dtype: typing.Any = jnp.float32
) -> PackedWeight:
    """Convert a kernel that qwix quantized to a packed weight; no code is rounded again.

    Args:
        array: A kernel ``(..., in, out)`` in int8, int4, int2 or float8_e4m3fn, with scales per matrix, per output, or per group of
            inputs and output.
        activations: Format that the inputs are quantized to; None leaves them unquantized.
        dtype: The dtype of results.

    Raises:
        ValueError: The codes have another dtype, or the scales are shared in another way.

    Example:
        >>> import qwix
        >>> kernel = jax.random.normal(jax.random.key(0), (64, 32))
        >>> array = qwix.quantize(kernel, "int8", channelwise_axes=(1,))
        >>> packed = from_qarray(array, activations=Format(granularity="token"))
        >>> bool(jnp.array_equal(packed.dense(), qwix.dequantize(array)))
        True
    """
    kinds = {"int8": (8, False), "int4": (4, False), "int2": (2, False), "float8_e4m3fn": (8, True)}
    kind = str(np.dtype(array.qvalue.dtype))
    if kind not in kinds or array.qtype == "nf4":
        raise ValueError(f"codes must be {', '.join(kinds)}, got codes of {array.qtype or kind}")
    bits, floating = kinds[kind]
    *stack, d_in, d_out = array.qvalue.shape
    *of_stack, rows, columns = array.scale.shape
    if list(of_stack) != stack:
        raise ValueError(
            f"each matrix of a stack needs its own scales, got scales of shape {array.scale.shape} for codes of shape {array.qvalue.shape}"
        )
    zero_point = array.zero_point
    if rows > 1:
        granularity: typing.Any = "group"
    else:
        granularity = "channel" if columns == d_out and d_out > 1 else "tensor"
    if columns not in (1, d_out) or d_in % rows or (rows > 1 and columns != d_out):
        raise ValueError(
            f"scales must be per matrix, per output, or per group of inputs and output, got scales of shape {array.scale.shape} "
            f"for codes of shape {array.qvalue.shape}"
        )
    format = Format(
        bits=bits,
        floating=floating,
        symmetric=zero_point is None,
        granularity=granularity,
        group_size=d_in // rows if rows > 1 else None,
    )
    check_packable(d_in, format, activations)
    if bits == 2 and bool(jnp.any(array.qvalue.astype(jnp.int8) == -2)):
        raise ValueError("int2 codes must be -1, 0 and 1, got -2")
    axes = {"group": (), "channel": (-2,), "tensor": (-2, -1)}[granularity]
    scale = array.scale.astype(jnp.float32)
    zero = None if zero_point is None else -zero_point.astype(jnp.float32) * scale
    codes = array.qvalue if floating else array.qvalue.astype(jnp.int8)
    found = Quantized(
        codes, jnp.squeeze(scale, axes), None if zero is None else jnp.squeeze(zero, axes), format
    )
    return pack_quantized(found, dtype, activations=activations)


def _spread(a: jax.Array, weight: PackedWeight) -> jax.Array:
    """Return scales or zero points with the same number of dimensions as the kernel."""
    granularity = weight.format.granularity
    if granularity == "group":
        return a
    if granularity == "block":
        a, granularity = jnp.repeat(a, weight.shape[-1] // a.shape[-1], -1), "channel"
    return a[..., None, :] if granularity == "channel" else a[..., None, None]


def _qarray() -> typing.Any:
    """Return the class, or raise an error that says how to install it."""
    require("QArray", "qwix")
    from qwix import QArray

    return QArray
