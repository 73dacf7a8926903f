"""The public function: checks and the choice of an implementation."""

from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Array, Float, Int8

from kernels_pallas import dispatch
from kernels_pallas.packed_codes import check_codes, why_no_kernel
from kernels_pallas.packed_matmul.reference import reference

Implementation = Literal["reference", "tpu", "gpu"]
IMPLEMENTATIONS: tuple[str, ...] = ("reference", "tpu", "gpu")


def packed_matmul(
    x: Float[Array, "rows d_in"],
    weight: Int8[Array, "d_out bytes"],
    scale: Float[Array, "groups d_out"],
    zero: Float[Array, "groups d_out"] | None = None,
    bias: Float[Array, " d_out"] | None = None,
    *,
    bits: int = 8,
    activation: Callable[[Array], Array] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "rows d_out"]:
    r"""Multiply floats by a weight of packed codes, for few rows, reading the packed weight only once.

    $$y_{to} = \mathrm{act}\Big(\sum_i x_{ti} \, (w_{g(i) o} \, c_{oi} + z_{g(i) o}) + b_o\Big)$$

    with the codes $c$, and the scale $w$ and zero point $z$ of the group of consecutive inputs $g(i)$.

    Args:
        x: Inputs, float32 or bfloat16.
        weight: Codes of the weight, one row per output, packed as ``kernels_pallas.packed_codes`` describes.
        scale: float32 scale of each group and output. One group means one scale per output.
        zero: float32 offset added to each number of a group; None adds nothing.
        bias: Added to each output; None adds nothing.
        bits: Number of bits per code of the weight: 8, 4, 2 or 1.
        activation: Elementwise function from float32 to float32. A kernel supports only what Pallas can lower: erf, but not
            erfc.
        implementation: "reference" (plain jnp), "tpu" or "gpu" (Pallas kernels), or None: the best one for the platform that
            the program is lowered for.

    Returns:
        The outputs, in the dtype of ``x``; sums are float32.

    Raises:
        ValueError: The operands do not match, or a name is unknown.
        NotImplementedError: The named implementation does not support these operands here.

    Examples:
        >>> import jax.numpy as jnp
        >>> x, weight = jnp.array([[1.0, 10.0]]), jnp.array([[0x21], [0x7F]], jnp.int8)  # codes 1 and 2; -1 and 7
        >>> packed_matmul(x, weight, jnp.array([[1.0, 0.5]]), bits=4).tolist()
        [[21.0, 34.5]]
    """
    dispatch.check_name(implementation, IMPLEMENTATIONS)
    check_operands(x, weight, scale, zero, bias, bits)
    return dispatch.by_implementation(
        "packed_matmul",
        implementation,
        _FUNCTIONS,
        lambda name: why_not(name, x, weight, scale, bits),
        (x, weight, scale, zero, bias),
        bits=bits,
        activation=activation,
    )


def check_operands(x: Any, weight: Any, scale: Any, zero: Any, bias: Any, bits: int) -> None:
    """Raise a ``ValueError`` if operands do not match; they only need a shape and a dtype."""
    check_codes(x, weight, bits)
    d_out, d_in = weight.shape[0], x.shape[1]
    groups = scale.shape[0]
    if scale.shape[1] != d_out or groups == 0 or d_in % groups:
        raise ValueError(
            f"scale must be [groups, {d_out}] with groups that divide the {d_in} inputs, got {scale.shape}"
        )
    if zero is not None and zero.shape != scale.shape:
        raise ValueError(f"zero must have the shape of scale, {scale.shape}, got {zero.shape}")
    if bias is not None and tuple(bias.shape) != (d_out,):
        raise ValueError(f"bias must have the shape ({d_out},), got {bias.shape}")


def why_not(name: str, x: Any, weight: Any, scale: Any, bits: int) -> str | None:
    """Return why an implementation does not support these operands here, or None if it does."""
    if name not in ("tpu", "gpu"):
        return None
    return why_no_kernel(x, weight) or _kernels(name).why_not(x, weight, scale.shape[0], bits)


def _kernels(name: str) -> Any:
    if name == "tpu":
        from kernels_pallas.packed_matmul import tpu

        return tpu
    from kernels_pallas.packed_matmul import gpu

    return gpu


_FUNCTIONS = {
    "reference": lambda: reference,
    "tpu": lambda: _kernels("tpu").packed_matmul,
    "gpu": lambda: _kernels("gpu").packed_matmul,
}
