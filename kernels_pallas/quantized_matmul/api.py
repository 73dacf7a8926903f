"""The public function: checks and the choice of an implementation."""

from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Array, Float, Int8, Int32

from kernels_pallas import dispatch
from kernels_pallas.packed_codes import check_codes, why_no_kernel
from kernels_pallas.quantized_matmul.reference import STEPS, reference

Implementation = Literal["reference", "tpu", "gpu"]
IMPLEMENTATIONS: tuple[str, ...] = ("reference", "tpu", "gpu")


def quantized_matmul(
    x: Float[Array, "rows d_in"],
    weight: Int8[Array, "d_out bytes"],
    scale: Float[Array, " d_out"],
    bias: Float[Array, " d_out"] | None = None,
    code_sums: Int32[Array, " d_out"] | None = None,
    *,
    bits: int = 8,
    activation: Callable[[Array], Array] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "rows d_out"]:
    r"""Multiply quantized inputs and weights as integers: quantize each row, multiply, then apply scales, bias and activation.

    $$y_{to} = \mathrm{act}\Big(s_t \, w_o \sum_i q_{ti} \, c_{oi} + b_o\Big), \qquad
        s_t = \frac{1}{127} \max_i |x_{ti}|, \quad q_{ti} = \mathrm{round}(x_{ti} / s_t)$$

    with the codes $c$ and scales $w$ of the weight. Sums are exact, in 32 bits; what follows is float32. With
    ``code_sums``, the codes of a row cover the range from its smallest to its largest number, and code 0 represents $z_t$:

    $$y_{to} = \mathrm{act}\Big(w_o \big(s_t \sum_i q_{ti} \, c_{oi} + z_t \sum_i c_{oi}\big) + b_o\Big), \qquad
        s_t = \frac{\max_i x_{ti} - \min_i x_{ti}}{255}, \quad z_t = s_t \, \big(\mathrm{round}(\min_i x_{ti} / s_t) + 128\big), \quad
        q_{ti} = \mathrm{round}\big((x_{ti} - z_t) / s_t\big)$$

    Args:
        x: Inputs, float32 or bfloat16. A row of zeros has the scale 1.
        weight: Codes of the weight, one row per output, packed as ``kernels_pallas.packed_codes`` describes.
        scale: float32 scale of each output.
        bias: Added to each output; None adds nothing.
        code_sums: The sum of each output's codes, $\sum_i c_{oi}$: gives the inputs of each row a zero point. None
            quantizes them symmetrically.
        bits: Number of bits per code of the weight: 8, 4, 2 or 1.
        activation: Elementwise function from float32 to float32. A kernel supports only what Pallas can lower: erf, but not
            erfc.
        implementation: "reference" (plain jnp), "tpu" or "gpu" (Pallas kernels), or None: the best one for the platform that
            the program is lowered for.

    Returns:
        The outputs, in the dtype of ``x``.

    Raises:
        ValueError: The operands do not match, or a name is unknown.
        NotImplementedError: The named implementation does not support these operands here.

    Examples:
        >>> import jax.numpy as jnp
        >>> x, weight = jnp.array([[127.0, -254.0]]), jnp.array([[1, 2], [3, 4]], jnp.int8)
        >>> quantized_matmul(x, weight, jnp.array([1.0, 0.5])).tolist()  # codes 64 and -127, scale 2
        [[-380.0, -316.0]]

    References:
        Yao et al., "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers" (2022),
            section 4.3. https://arxiv.org/abs/2206.01861
    """
    dispatch.check_name(implementation, IMPLEMENTATIONS)
    check_operands(x, weight, scale, bias, code_sums, bits)
    return dispatch.by_implementation(
        "quantized_matmul",
        implementation,
        _FUNCTIONS,
        lambda name: why_not(name, x, weight, bits),
        (x, weight, scale, bias, code_sums),
        bits=bits,
        activation=activation,
    )


def check_operands(x: Any, weight: Any, scale: Any, bias: Any, code_sums: Any, bits: int) -> None:
    """Raise a ``ValueError`` if operands do not match; they only need a shape and a dtype."""
    check_codes(x, weight, bits)
    d_out, d_in = weight.shape[0], x.shape[1]
    for name, value in (("scale", scale), ("bias", bias), ("code_sums", code_sums)):
        if value is not None and tuple(value.shape) != (d_out,):
            raise ValueError(f"{name} must have the shape ({d_out},), got {value.shape}")
    if d_in * STEPS * 128 >= 2**31:
        raise ValueError(
            f"x must have at most {(2**31 - 1) // (STEPS * 128)} inputs, got {d_in}: the sum of more products of codes may overflow 32 bits"
        )


def why_not(name: str, x: Any, weight: Any, bits: int) -> str | None:
    """Return why an implementation does not support these operands here, or None if it does."""
    if name not in ("tpu", "gpu"):
        return None
    return why_no_kernel(x, weight) or _kernels(name).why_not(x, weight, bits)


def _kernels(name: str) -> Any:
    if name == "tpu":
        from kernels_pallas.quantized_matmul import tpu

        return tpu
    from kernels_pallas.quantized_matmul import gpu

    return gpu


_FUNCTIONS = {
    "reference": lambda: reference,
    "tpu": lambda: _kernels("tpu").quantized_matmul,
    "gpu": lambda: _kernels("gpu").quantized_matmul,
}
