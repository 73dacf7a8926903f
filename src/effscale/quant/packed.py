"""Packed weights: quantized matrices that are multiplied directly in their packed form."""

import dataclasses
import typing
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from effscale.models import finish
from effscale.models.activations import ACTIVATIONS, Activation
from effscale.quant.formats import Format, pack, stored_bits, unpack, unpack_planes
from effscale.quant.quantizers import Quantized, encode, quantize
from effscale.quant.row_products import WITHIN, row_product, serves_row
from kernels_pallas import dispatch, packed_matmul, quantized_matmul
from kernels_pallas.packed_matmul.api import why_not as why_not_packed
from kernels_pallas.quantized_matmul.api import why_not as why_not_quantized

WIDE = 8192
"""From this number of outputs, XLA's CPU backend is slow at multiplying a single row by weights that it converts to floats, but not at
multiplying four rows."""

_TOKENS = (Format(granularity="token"), Format(granularity="token", symmetric=False))
"""The input formats that the kernels of 8-bit products support."""

LONGEST = 2**31 // 2**14
"""Number of inputs from which a sum of products of 8-bit codes may overflow 32 bits."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX makes it of shapes, shardings and placeholders, too
class PackedWeight:
    """A quantized matrix, created by ``pack_weight``; implements ``effscale.models.Weight``.

    It represents a dense kernel of shape ``(..., in, out)``, or, if ``is_table``, an embedding table of shape ``(...,
    rows, width)``. In memory both are rows of packed codes: one row per output of the kernel, or per row of the
    table.

    Attributes:
        data: Packed codes, ``(..., out, in * bits / 8)`` bytes (see ``effscale.quant.qarrays``).
        scale: float32, of shape ``effscale.quant.scale_shape`` of the kernel.
        zero: float32, same shape as ``scale``; None for symmetric formats.
        input_scale: float32, one per matrix: the scale of its inputs, from static calibration. If None, the scale of
            each input is computed from the input.
        input_zero: float32, same shape as ``input_scale``; None for symmetric formats.
        sums: int32, ``(..., out)``: the sum of each output's codes, which is multiplied by the zero points of the
            inputs; None if the inputs have no zero points.
        format: Format of the weight.
        activations: Format that inputs are quantized to before the product; None leaves them unquantized. If set, the
            product is computed in integers, unless the weight has groups along its inputs or one of the two is
            float8. In these cases, and if None, the weight is converted to floats inside the product.
        is_table: Whether it represents a table, whose transpose is the kernel.
        compute: The dtype of the result.
    """

    data: Shaped[Array, "*stack d_out bytes"]
    scale: Float[Array, "*groups"]
    zero: Float[Array, "*groups"] | None
    input_scale: Float[Array, "*stack"] | None = None
    input_zero: Float[Array, "*stack"] | None = None
    sums: Int[Array, "*stack d_out"] | None = None
    format: Format = dataclasses.field(default=Format(), metadata={"static": True})
    activations: Format | None = dataclasses.field(default=None, metadata={"static": True})
    is_table: bool = dataclasses.field(default=False, metadata={"static": True})
    compute: Any = dataclasses.field(default=jnp.dtype("float32"), metadata={"static": True})

    fixed_weight: typing.ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array that it represents."""
        *stack, d_out, size = self.data.shape
        d_in = size * 8 // stored_bits(self.format.bits)
        return (*stack, d_out, d_in) if self.is_table else (*stack, d_in, d_out)

    @property
    def dtype(self) -> Any:
        """Dtype of the result."""
        return self.compute

    @property
    def T(self) -> "PackedWeight":
        """The transpose: the table of a kernel, or the kernel of a table; no data is moved."""
        return dataclasses.replace(self, is_table=not self.is_table)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, scales and zero points."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def astype(self, dtype: Any) -> "PackedWeight":
        """Return the same codes with results in another dtype."""
        return dataclasses.replace(self, compute=jnp.dtype(dtype))

    def dense(self) -> Float[Array, "*shape"]:
        """Return the values that the codes represent."""
        kernel = self._quantized().values().astype(self.compute)
        return kernel.mT if self.is_table else kernel

    def take(self, indices: Int[Array, "*rows"]) -> Float[Array, "*rows width"]:
        """Return rows of the dense array; for a table, only these rows are unpacked."""
        if not self.is_table or self.format.granularity == "block":
            return jnp.take(self.dense(), indices, axis=0, mode="clip")
        chosen = lambda a, axis: jnp.take(a, indices.reshape(-1), axis, mode="clip")
        scale, zero = self.scale, self.zero
        if self.format.granularity != "tensor":
            scale, zero = chosen(scale, -1), None if zero is None else chosen(zero, -1)
        rows = dataclasses.replace(self, data=chosen(self.data, 0), scale=scale, zero=zero)
        return rows.dense().reshape(*indices.shape, -1)

    @property
    def input_form(self) -> tuple[str, Format, bool] | None:
        """The form that an input is converted to before the product, so that several products of the same input can share it."""
        if self.is_table or self.activations is None:
            return None
        # Layers that read the same input have the same calibration.
        return "codes", self.activations, self.input_scale is not None

    def prepare(self, x: Float[Array, "rows d_in"]) -> "PreparedInput":
        """Return the input as codes."""
        format, fixed = cast("Format", self.activations), jax.lax.stop_gradient(x)
        if self.input_scale is None:
            return PreparedInput(x, quantize(fixed, format))
        codes = encode(fixed.astype(jnp.float32), self.input_scale, self.input_zero, format)
        return PreparedInput(x, Quantized(codes, self.input_scale, self.input_zero, format))

    def matmul(
        self, x: Any, bias: Float[Array, "d_out"] | None, activation: Activation | None
    ) -> Float[Array, "rows d_out"]:
        """Return ``activation(x W + b)``.

        Args:
            x: ``(rows, in)``, or the result of ``prepare``.
            bias: ``(out,)`` or None.
            activation: A name in ``effscale.models.ACTIVATIONS``, or None.
        """
        values = x.values if isinstance(x, PreparedInput) else x
        if kernel_serves(values, self):
            return kernel_product(activation, values, bias, self)
        if not isinstance(x, PreparedInput) and self.input_form is not None:
            x = self.prepare(x)
        if isinstance(x, PreparedInput):
            y = _product_of_codes(x.values, x.codes, self)
        else:
            y = self._float_product(x)
        return finish(y.astype(self.compute), bias, activation)

    def partition(self, axes: tuple[str | None, ...]) -> "PackedWeight":
        """Return the logical axes of each part, given those of the dense array."""
        *stack, d_in, d_out = axes if not self.is_table else (*axes[:-2], axes[-1], axes[-2])
        groups = {
            "tensor": tuple(stack),
            "channel": (*stack, d_out),
            "group": (*stack, None, d_out),
            "block": (*stack, None),
        }[self.format.granularity]
        where = lambda array, names: None if array is None else names
        return dataclasses.replace(
            self,
            data=(*stack, d_out, d_in),
            scale=groups,
            zero=where(self.zero, groups),
            input_scale=where(self.input_scale, tuple(stack)),
            input_zero=where(self.input_zero, tuple(stack)),
            sums=where(self.sums, (*stack, d_out)),
        )

    def _quantized(self) -> Quantized:
        """Return the codes and scales of the kernel."""
        codes = self.data if self.format.floating else unpack(self.data, self.format.bits)
        # Codes get no gradient, so scales must not get one either.
        scale, zero = jax.lax.stop_gradient((self.scale, self.zero))
        return Quantized(codes.mT, scale, zero, self.format)

    def _float_product(self, x: Array) -> Array:
        """Multiply an unquantized input by the weight converted to floats."""
        product = lambda x: x @ self.dense()
        return product(x) if self.shape[-1] < WIDE else _few_rows_padded(product, x)

    def _integer_product(self, x: Quantized) -> Array:
        """Multiply codes as integers, and apply the scales to the result."""
        if not _is_integer_product(self.format, x.format):
            rounded = x.values().astype(self.compute)
            return self._float_product(rounded)
        d_out, width = self.data.shape

        def product(codes: Array) -> Array:
            sums = jnp.zeros((), jnp.int32)
            for i, plane in enumerate(unpack_planes(self.data, self.format.bits)):
                part = codes[:, i * width : (i + 1) * width]
                contracting = (((1,), (1,)), ((), ()))
                sums = sums + jax.lax.dot_general(
                    part, plane, contracting, preferred_element_type=jnp.int32
                )
            return sums

        if serves_row(x.codes.shape[0], self.data, self.format.bits):
            sums = row_product(x.codes, self.data, self.format.bits)
        else:
            sums = _few_rows_padded(product, x.codes)
        row, column = lambda a: a.reshape(-1, 1), lambda a: _per_output(a, d_out)[None]
        y = row(x.scale) * sums.astype(jnp.float32)
        if x.zero is not None:
            sums_of_codes = cast("Array", self.sums).astype(jnp.float32)
            y = y + row(x.zero) * sums_of_codes[None]
        y = y * column(self.scale)
        if self.zero is not None:
            y = y + row(jnp.sum(x.values(), 1)) * column(self.zero)
        return y


def pack_weight(
    weight: Float[Array, "*stack d_in d_out"],
    format: Format,
    *,
    activations: Format | None = None,
    is_table: bool = False,
) -> PackedWeight:
    """Quantize and pack a matrix.

    Args:
        weight: A kernel ``(..., in, out)``, or a table ``(..., rows, width)``.
        format: The format of the weight; ``channel`` means each output of a kernel, or each row of a table.
        activations: Format that the inputs are quantized to, per token or per tensor; None leaves them unquantized.
        is_table: Whether it is an embedding table.

    Raises:
        ValueError: The formats do not match the matrix or each other.

    Example:
        >>> weight = jax.random.normal(jax.random.key(0), (64, 32))
        >>> packed = pack_weight(weight, Format(bits=4), activations=Format(granularity="token"))
        >>> packed.nbytes, weight.nbytes  # half a byte per value, and one scale per output
        (1152, 8192)
        >>> x = jax.random.normal(jax.random.key(1), (8, 64))
        >>> error = packed.matmul(x, None, None) - x @ weight
        >>> bool(jnp.linalg.norm(error) < 0.2 * jnp.linalg.norm(x @ weight))
        True
    """
    kernel = weight.mT if is_table else weight
    check_packable(kernel.shape[-2], format, activations)
    found = quantize(kernel, format)
    return pack_quantized(found, weight.dtype, activations=activations, is_table=is_table)


def pack_quantized(
    found: Quantized, dtype: Any, *, activations: Format | None = None, is_table: bool = False
) -> PackedWeight:
    """Pack a kernel that is already quantized, for example by ``effscale.quant.gptq``.

    Args:
        found: Codes and scales of a kernel ``(..., in, out)``.
        dtype: The dtype of results.
        activations: As for ``pack_weight``.
        is_table: Whether the kernel is the transpose of a table.

    Raises:
        ValueError: The codes do not fill whole bytes, or inputs cannot be quantized to ``activations``.
    """
    check_packable(found.codes.shape[-2], found.format, activations)
    format, codes = found.format, found.codes.mT
    data = codes if format.floating else pack(codes, format.bits)
    sums = _sums(codes) if _needs_sums(format, activations) else None
    return PackedWeight(
        data,
        found.scale,
        found.zero,
        sums=sums,
        format=format,
        activations=activations,
        is_table=is_table,
        compute=jnp.dtype(dtype),
    )


def packed_of_arrays(
    data: Any,
    scale: Any,
    zero: Any = None,
    *,
    input_scale: Any = None,
    input_zero: Any = None,
    format: Format,
    activations: Format | None,
    is_table: bool,
    dtype: Any,
) -> PackedWeight:
    """Build a packed weight from the arrays of a file. NumPy arrays stay NumPy arrays. The arrays must match each other."""
    sums: Any = None
    if _needs_sums(format, activations):
        sums = np.asarray(_sums(unpack(jnp.asarray(data), format.bits)))
    return PackedWeight(
        data,
        scale,
        zero,
        input_scale=input_scale,
        input_zero=input_zero,
        sums=sums,
        format=format,
        activations=activations,
        is_table=is_table,
        compute=jnp.dtype(dtype),
    )


def check_packable(d_in: int, format: Format, activations: Format | None) -> None:
    """Raise a ``ValueError`` unless a kernel with ``d_in`` inputs can be packed and its inputs quantized in these formats."""
    check_formats(format, activations)
    per_byte = 8 // stored_bits(format.bits)
    if d_in % per_byte:
        raise ValueError(
            f"the number of inputs must be a multiple of {per_byte} to fill whole bytes with {format.bits}-bit codes, got {d_in}"
        )
    if activations is not None and _is_integer_product(format, activations) and d_in >= LONGEST:
        raise ValueError(
            f"the number of inputs must be less than {LONGEST}, got {d_in}: the sum of their products may overflow 32 bits"
        )


def check_formats(weights: Format, activations: Format | None) -> None:
    """Raise a ``ValueError`` if a format is not valid for weights or for activations."""
    if weights.granularity == "token":
        raise ValueError(
            "granularity must be tensor, channel, group or block for weights, got 'token', which is for activations"
        )
    if activations is not None and activations.granularity not in ("token", "tensor"):
        raise ValueError(
            f"activations: granularity must be token or tensor, got {activations.granularity!r}"
        )


class PreparedInput(NamedTuple):
    """An input and its quantized form."""

    values: Array
    codes: Quantized


@jax.custom_vjp
def _product_of_codes(x: Array, codes: Quantized, weight: PackedWeight) -> Array:
    """Multiply codes. The gradient passes to ``x`` as if neither ``x`` nor the weight had been rounded."""
    del x
    return weight._integer_product(codes)


def _product_forward(x: Array, codes: Quantized, weight: PackedWeight) -> tuple[Array, Any]:
    return _product_of_codes(x, codes, weight), (x, codes, weight)


def _product_backward(saved: Any, gradient: Array) -> tuple[Any, ...]:
    x, codes, weight = saved
    nothing = lambda a: (
        jnp.zeros_like(a)
        if jnp.issubdtype(a.dtype, jnp.floating)
        else np.zeros(a.shape, jax.dtypes.float0)
    )
    of_x = gradient.astype(weight.compute) @ weight.dense().mT
    return of_x.astype(x.dtype), jax.tree.map(nothing, codes), jax.tree.map(nothing, weight)


_product_of_codes.defvjp(_product_forward, _product_backward)


def kernel_serves(x: Float[Array, "rows d_in"], weight: PackedWeight) -> bool:
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
    weight: PackedWeight,
) -> Float[Array, "rows d_out"]:
    """Compute ``activation(x W + b)`` with a kernel. The gradient passes to ``x`` as if neither ``x`` nor the weight had been rounded."""
    within = None if activation is None else WITHIN.get(activation)
    scale, zero = _of_groups(weight)
    options: dict[str, Any] = {"bits": stored_bits(weight.format.bits), "activation": within}
    if weight.activations is None:
        y = packed_matmul(x, weight.data, scale, zero, bias, **options)
    else:
        y = quantized_matmul(x, weight.data, scale[0], bias, weight.sums, **options)
    y = y.astype(weight.compute)
    return y if within is not None or activation is None else ACTIVATIONS[activation](y)


def _kernel_forward(
    activation: Activation | None, x: Array, bias: Any, weight: Any
) -> tuple[Array, Any]:
    y = kernel_product(None, x, None, weight)
    out, pullback = jax.vjp(lambda y, bias: finish(y, bias, activation), y, bias)
    return out, (pullback, weight, x)


def _kernel_backward(activation: Activation | None, saved: Any, gradient: Array) -> tuple[Any, ...]:
    del activation
    pullback, weight, x = saved
    of_y, of_bias = pullback(gradient)
    of_x = of_y.astype(weight.compute) @ weight.dense().mT
    return of_x.astype(x.dtype), of_bias, None


kernel_product.defvjp(_kernel_forward, _kernel_backward)


def _of_groups(weight: PackedWeight) -> tuple[Array, Array | None]:
    """Return scales and zero points, ``(groups, out)``."""

    def spread(a: Array | None) -> Array | None:
        if a is None or weight.format.granularity == "group":
            return a
        return _per_output(a, weight.data.shape[0])[None]

    scale = spread(weight.scale)
    assert scale is not None
    return jax.lax.stop_gradient((scale, spread(weight.zero)))


def _needs_sums(format: Format, activations: Format | None) -> bool:
    """Return whether a product of codes must multiply the zero points of its inputs by the sums of the weight's codes."""
    if activations is None or activations.symmetric:
        return False
    return _is_integer_product(format, activations)


@jax.jit
def _sums(codes: Array) -> Array:
    return jnp.sum(codes, -1, dtype=jnp.int32)


def _is_integer_product(weights: Format, activations: Format) -> bool:
    """Return whether products of codes can be summed as integers: not if scales vary along the sum, nor if codes are floats."""
    return weights.granularity != "group" and not weights.floating and not activations.floating


def _few_rows_padded(product: Callable[[Array], Array], x: Array) -> Array:
    """Compute ``product(x)``, with a single row padded to four: for a single row, XLA's CPU backend converts integers to 32 bits, which takes
    five times as long.
    """
    if x.shape[0] != 1:
        return product(x)
    return product(jnp.pad(x, ((0, 3), (0, 0))))[:1]


def _per_output(a: Array, d_out: int) -> Array:
    """Expand one value per matrix, per block or per output to one value per output."""
    return jnp.repeat(a.reshape(-1), d_out // a.size)
