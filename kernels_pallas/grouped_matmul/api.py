"""The public function: checks, and the choice of an implementation."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.grouped_matmul import buffers, reference

Implementation = Literal["reference", "buffers", "ragged_dot"]
IMPLEMENTATIONS: tuple[str, ...] = ("reference", "buffers", "ragged_dot")


def grouped_matmul(
    x: Float[Array, "rows d_in"],
    weight: Float[Array, "groups d_in d_out"],
    sizes: Int[Array, " groups"],
    bias: Float[Array, "groups d_out"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "rows d_out"]:
    r"""Multiply rows, sorted by group, by the matrix of their group: $y_r = x_r W_{g(r)} + b_{g(r)}$.

    The experts of a layer without a capacity are such groups. Sums are float32. Differentiable in ``x``, ``weight`` and ``bias``.

    Args:
        x: The rows of group 0, then those of group 1, and so on; float32 or bfloat16.
        weight: One matrix per group, in the dtype of ``x``.
        sizes: Number of rows of each group. Rows after the last group give zeros.
        bias: Added to each row; None adds nothing.
        implementation: "reference" (a masked product, whose work is multiplied by the number of groups), "buffers" (a batched product,
            and a loop over rows that do not fit), "ragged_dot" (``jax.lax.ragged_dot``, which is a kernel on TPUs and a
            masked product elsewhere), or None: "ragged_dot" in programs for TPUs, otherwise "buffers".

    Returns:
        The products, in the dtype of ``x``.

    Raises:
        ValueError: The operands do not match, or a name is unknown.

    Examples:
        >>> import jax.numpy as jnp
        >>> x, weight = jnp.ones((3, 2)), jnp.array([[[1.0], [1.0]], [[5.0], [5.0]]])
        >>> grouped_matmul(x, weight, jnp.array([1, 2]))[:, 0].tolist()
        [2.0, 10.0, 10.0]
    """
    dispatch.check_name(implementation, IMPLEMENTATIONS)
    check_operands(x, weight, sizes, bias)
    functions: dict[str, Callable[..., Any]] = {
        "reference": reference.grouped_matmul,
        "buffers": buffers.grouped_matmul,
        "ragged_dot": _ragged_dot,
    }
    if implementation is not None:
        return functions[implementation](x, weight, sizes, bias)
    by_platform = {"default": functions["buffers"], "tpu": functions["ragged_dot"]}
    return dispatch.by_platform(by_platform, x, weight, sizes, bias)


def check_operands(x: Any, weight: Any, sizes: Any, bias: Any) -> None:
    """Raise a ``ValueError`` if operands do not match; they only need a shape and a dtype."""
    groups, d_in, d_out = weight.shape
    if x.shape[1] != d_in:
        raise ValueError(
            f"x must have the {d_in} inputs of weight {weight.shape}, got the shape {x.shape}"
        )
    if sizes.shape != (groups,):
        raise ValueError(
            f"sizes must have one entry for each of the {groups} groups of weight, got the shape {sizes.shape}"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}")
    if bias is not None and bias.shape != (groups, d_out):
        raise ValueError(f"bias must have the shape ({groups}, {d_out}), got {bias.shape}")


def _ragged_dot(x: Array, weight: Array, sizes: Array, bias: Array | None) -> Array:
    sizes = sizes.astype(jnp.int32)
    y = jax.lax.ragged_dot(x, weight, sizes, preferred_element_type=jnp.float32)
    mine = reference.group_of_rows(sizes, x.shape[0])
    if bias is not None:
        y = y + bias[jnp.minimum(mine, weight.shape[0] - 1)].astype(jnp.float32)
    return jnp.where((mine < weight.shape[0])[:, None], y, 0).astype(x.dtype)
