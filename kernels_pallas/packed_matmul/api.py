"""The public function: checks and the choice of an implementation."""

import functools
from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Array, Float, Int8

from kernels_pallas import dispatch
from kernels_pallas.packed_codes import BITS
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
    if implementation is not None and (reason := why_not(implementation, x, weight, scale, bits)):
        raise dispatch.Unsupported(
            f"packed_matmul: implementation={implementation!r} is not supported here: {reason}."
        )
    functions = {"default": _function(implementation or "reference")}
    if implementation is None and why_not("tpu", x, weight, scale, bits) is None:
        functions["tpu"] = _function("tpu")
    hopper = implementation is None and dispatch.hopper_in_use()
    if hopper and why_not("gpu", x, weight, scale, bits) is None:
        functions["cuda"] = _function("gpu")
    functions = {
        platform: functools.partial(function, bits=bits, activation=activation)
        for platform, function in functions.items()
    }
    return dispatch.by_platform(functions, x, weight, scale, zero, bias)


def check_operands(x: Any, weight: Any, scale: Any, zero: Any, bias: Any, bits: int) -> None:
    """Raise a ``ValueError`` if operands do not match; they only need a shape and a dtype."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    (d_out, width), d_in = weight.shape, x.shape[1]
    if width * (8 // bits) != d_in:
        raise ValueError(
            f"x must have the {width * (8 // bits)} inputs of weight {weight.shape} with {bits}-bit codes, got the shape {x.shape}"
        )
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
    if axes := dispatch.auto_partitioned():
        return (
            f"the mesh axes {axes} are partitioned by the compiler, which cannot split a Pallas kernel; call it inside "
            "jax.shard_map over all of them"
        )
    if 0 in x.shape or 0 in weight.shape:
        return f"x {x.shape} or weight {weight.shape} is empty"
    if name == "tpu":
        from kernels_pallas.packed_matmul import tpu

        return tpu.why_not(x, weight, scale.shape[0], bits)
    from kernels_pallas.packed_matmul import gpu

    return gpu.why_not(x, weight, scale.shape[0], bits)


def _function(name: str) -> Callable[..., Any]:
    if name == "tpu":
        from kernels_pallas.packed_matmul import tpu

        return tpu.packed_matmul
    if name == "gpu":
        from kernels_pallas.packed_matmul import gpu

        return gpu.packed_matmul
    return reference
