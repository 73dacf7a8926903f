"""qwix's ``QArray`` from packed weights, and packed weights from them."""

import typing

import jax
import jax.numpy as jnp
import numpy as np

from effscale.quant.formats import Format
from effscale.quant.packed import PackedWeight, check_packable, pack_quantized
from effscale.quant.packing import unpack
from effscale.quant.quantizers import Quantized

if typing.TYPE_CHECKING:
    from qwix import QArray

TYPES = {8: "int8", 4: "int4", 3: "int4", 2: "int2"}


def to_qarray(weight: PackedWeight) -> "QArray":
    """A packed kernel as qwix holds it.

    Args:
        weight: A kernel ``(..., in, out)``, or a stack of them, in integers of 2 bits or more or in float8.

    Returns:
        Codes in the shape of the kernel, with a scale of the same number of dimensions.

    Raises:
        ValueError: qwix has no such format: one bit, a table, or a zero point that is no multiple of the scale.
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
        raise ValueError("a table of embeddings: take its transpose, which is a kernel")
    if format.bits == 1:
        raise ValueError("qwix has no codes of one bit that are -1 and 1")
    codes = weight.data if format.floating else unpack(weight.data, format.bits)
    kind = "float8_e4m3fn" if format.floating else TYPES[format.bits]
    scale, zero = _spread(weight.scale, weight), None
    if weight.zero is not None:
        if not format.integer_zero:
            raise ValueError(
                "its zero points are no multiples of its scales, which Format(integer_zero=True) would make them"
            )
        zero = -jnp.round(_spread(weight.zero, weight) / scale)
        low, high = -(2 ** (format.bits - 1)), 2 ** (format.bits - 1) - 1
        if not bool(jnp.all((zero >= low) & (zero <= high))):
            raise ValueError(
                f"a zero point lies outside of {kind}: zero is not in the range of a group"
            )
        zero = zero.astype(kind)
    return QArray(codes.mT.astype(kind), scale, zero, kind)


def from_qarray(
    array: "QArray", *, activations: Format | None = None, dtype: typing.Any = jnp.float32
) -> PackedWeight:
    """A packed weight from a kernel that qwix quantized; no code is rounded again.

    Args:
        array: Of shape ``(..., in, out)``: int8, int4, int2 or float8_e4m3fn, with scales per matrix, per output, or per group of
            inputs and output.
        activations: What inputs of its products are quantized to; None leaves them as they are.
        dtype: The type of the results of its products.

    Raises:
        ValueError: The codes are of another type, or the scales are shared otherwise.

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
        raise ValueError(f"codes of {array.qtype or kind}: must be of one of {', '.join(kinds)}")
    bits, floating = kinds[kind]
    *stack, d_in, d_out = array.qvalue.shape
    *of_stack, rows, columns = array.scale.shape
    if list(of_stack) != stack:
        raise ValueError(
            f"scales of shape {array.scale.shape} for codes of shape {array.qvalue.shape}: each matrix of a stack needs its own"
        )
    zero_point = array.zero_point
    if rows > 1:
        granularity: typing.Any = "group"
    else:
        granularity = "channel" if columns == d_out and d_out > 1 else "tensor"
    if columns not in (1, d_out) or d_in % rows or (rows > 1 and columns != d_out):
        raise ValueError(
            f"scales of shape {array.scale.shape} for codes of shape {array.qvalue.shape}: "
            "must be per matrix, per output, or per group of inputs and output"
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
        raise ValueError("codes of int2 hold -2: ternary codes are -1, 0 and 1")
    axes = {"group": (), "channel": (-2,), "tensor": (-2, -1)}[granularity]
    scale = array.scale.astype(jnp.float32)
    zero = None if zero_point is None else -zero_point.astype(jnp.float32) * scale
    codes = array.qvalue if floating else array.qvalue.astype(jnp.int8)
    found = Quantized(
        codes, jnp.squeeze(scale, axes), None if zero is None else jnp.squeeze(zero, axes), format
    )
    return pack_quantized(found, dtype, activations=activations)


def _spread(a: jax.Array, weight: PackedWeight) -> jax.Array:
    """Scales or zero points with as many dimensions as the kernel."""
    granularity = weight.format.granularity
    if granularity == "group":
        return a
    if granularity == "block":
        a, granularity = jnp.repeat(a, weight.shape[-1] // a.shape[-1], -1), "channel"
    return a[..., None, :] if granularity == "channel" else a[..., None, None]


def _qarray() -> typing.Any:
    """The class, or an error that says how to get it."""
    try:
        from qwix import QArray
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'effscale[qwix]'") from error
    return QArray
