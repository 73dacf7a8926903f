"""The public functions: checks, the choice of an implementation, and the differentiation rule."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.expert_matmul import reference
from kernels_pallas.expert_matmul.reference import Rows
from kernels_pallas.grouped_matmul.api import check_operands as check_product

Implementation = Literal["reference", "tpu"]
IMPLEMENTATIONS: tuple[str, ...] = ("reference", "tpu")


def gather_matmul(
    x: Float[Array, "tokens d_in"],
    weight: Float[Array, "groups d_in d_out"],
    sizes: Int[Array, " groups"],
    source: Int[Array, " rows"],
    bias: Float[Array, "groups d_out"] | None = None,
    gate: Float[Array, "groups d_in d_out"] | None = None,
    gate_bias: Float[Array, "groups d_out"] | None = None,
    *,
    activation: Callable[[Array], Array] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "rows d_out"]:
    r"""Gather rows from unsorted tokens and multiply each by the matrix of its group: the experts' first projection.

    $$y_r = \mathrm{act}(x_{s(r)} W_{g(r)} + b_{g(r)}), \qquad \text{or} \qquad
        y_r = \mathrm{act}(x_{s(r)} G_{g(r)} + c_{g(r)}) \cdot (x_{s(r)} W_{g(r)} + b_{g(r)})$$

    with a gate. The kernel is for few tokens, as in decoding, where reading weights dominates: it reads only the weights of
    groups that have rows, and never writes the sorted copy of the tokens. Sums, activation and gating are float32. The op is
    differentiable in reverse mode, through the plain implementation.

    There is no GPU kernel. A Hopper's copy engine fetches rectangles instead of lists of rows (Blackwell's can), and its
    matrix units read their operands from shared memory, so rows would have to pass through registers one by one. The sums
    of a token, which blocks compute in parallel, would need atomic additions, whose order differs between runs.

    Args:
        x: Tokens in any order; float32 or bfloat16.
        weight: One matrix per group, in the dtype of ``x``.
        sizes: Number of rows of each group; the rows of group 0 come first. Rows after the last group give zeros.
        source: The token of each row, from 0 to tokens - 1.
        bias: Added to the product; None adds nothing.
        gate: The matrices of the gate's product; None: no gate.
        gate_bias: Added to the gate's product; None adds nothing.
        activation: Elementwise function from float32 to float32. The kernel supports only what Pallas can lower: erf, but
            not erfc.
        implementation: "reference" (a sorted copy and ``grouped_matmul``), "tpu" (a Pallas kernel), or None: the best one
            for the platform that the program is lowered for.

    Returns:
        The products of the rows, sorted by group, in the dtype of ``x``.

    Raises:
        ValueError: The operands do not match, or a name is unknown.
        NotImplementedError: The named implementation does not support these operands here.

    Examples:
        >>> import jax.numpy as jnp
        >>> x, weight = jnp.array([[1.0, 1.0], [2.0, 2.0]]), jnp.array([[[1.0], [1.0]], [[5.0], [5.0]]])
        >>> gather_matmul(x, weight, jnp.array([1, 2]), jnp.array([1, 0, 1]))[:, 0].tolist()
        [4.0, 10.0, 20.0]

    References:
        Rajbhandari et al., "DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI
            Scale" (2022), section 5.4. https://arxiv.org/abs/2201.05596
    """
    dispatch.check_name(implementation, IMPLEMENTATIONS)
    check_gather(x, weight, sizes, source, bias, gate, gate_bias)
    operands = (x, weight, sizes, source, bias, gate, gate_bias)
    reason = functools.partial(why_not_gather, x=x, weight=weight, source=source, gate=gate)
    return _run("gather_matmul", implementation, reason, operands, activation)


def matmul_scatter(
    h: Float[Array, "rows d_in"],
    weight: Float[Array, "groups d_in d_out"],
    sizes: Int[Array, " groups"],
    target: Int[Array, " rows"],
    scale: Float[Array, " rows"],
    bias: Float[Array, "groups d_out"] | None = None,
    *,
    num_tokens: int,
    implementation: Implementation | None = None,
) -> Float[Array, "tokens d_out"]:
    r"""Multiply sorted rows by the matrices of their groups and sum them per token with weights: the experts' last projection.

    $$y_t = \sum_{r:\, t(r) = t} a_r \, (h_r W_{g(r)} + b_{g(r)})$$

    Rows after the last group are ignored. Sums are float32. The op is differentiable in reverse mode, through the plain
    implementation. ``gather_matmul`` documents which sizes the kernel is for, and why there is no GPU kernel.

    Args:
        h: Rows sorted by group, as ``gather_matmul`` returns them; float32 or bfloat16.
        weight: One matrix per group, in the dtype of ``h``.
        sizes: Number of rows of each group.
        target: The token of each row, from 0 to ``num_tokens`` - 1.
        scale: float32 weight of each row.
        bias: Added to each row before it is weighted; None adds nothing.
        num_tokens: Number of rows of the result.
        implementation: As for ``gather_matmul``.

    Returns:
        The sums, in the dtype of ``h``; zeros for tokens that no row names.

    Raises:
        ValueError: The operands do not match, or a name is unknown.
        NotImplementedError: The named implementation does not support these operands here.

    Examples:
        >>> import jax.numpy as jnp
        >>> h, weight = jnp.ones((3, 2)), jnp.array([[[1.0], [1.0]], [[5.0], [5.0]]])
        >>> target, scale = jnp.array([1, 0, 1]), jnp.array([0.5, 1.0, 0.5])
        >>> matmul_scatter(h, weight, jnp.array([1, 2]), target, scale, num_tokens=2)[:, 0].tolist()
        [10.0, 6.0]

    References:
        Rajbhandari et al., "DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI
            Scale" (2022), section 5.4. https://arxiv.org/abs/2201.05596
    """
    dispatch.check_name(implementation, IMPLEMENTATIONS)
    check_scatter(h, weight, sizes, target, scale, bias)
    operands = (h, weight, sizes, target, scale, bias)
    reason = functools.partial(why_not_scatter, h=h, weight=weight, num_tokens=num_tokens)
    return _run("matmul_scatter", implementation, reason, operands, num_tokens)


def sort_rows(
    experts: Int[Array, "tokens k"],
    positions: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
    sizes: Int[Array, " groups"],
    *,
    implementation: Implementation | None = None,
) -> Rows:
    """Sort rows by expert: return the token and the weight of each row, from a router's table for the other two ops.

    Args:
        experts: The experts of each token, as ``kernels_pallas.top_k_gating`` returns them; numbers from the number of
            groups on mean none.
        positions: The token's position within each of them; positions must be distinct.
        weights: float32 weights of the experts' outputs.
        sizes: Number of tokens of each expert.
        implementation: As for ``gather_matmul``.

    Returns:
        ``token`` and ``weight`` of each of ``tokens * k`` rows; 0 after the rows of the last expert. There is no gradient.

    Raises:
        ValueError: The operands do not match, or a name is unknown.
        NotImplementedError: The named implementation does not support these operands here.

    Examples:
        >>> import jax.numpy as jnp
        >>> experts, positions = jnp.array([[1], [0], [1]]), jnp.array([[0], [0], [1]])
        >>> sort_rows(experts, positions, jnp.array([[0.1], [0.2], [0.3]]), jnp.array([1, 2])).token.tolist()
        [1, 0, 2]
    """
    dispatch.check_name(implementation, IMPLEMENTATIONS)
    if not experts.shape == positions.shape == weights.shape:
        raise ValueError(
            f"experts, positions and weights must have the same shape, got {experts.shape}, {positions.shape} and {weights.shape}"
        )
    operands = jax.lax.stop_gradient((experts, positions, weights, sizes))
    return _run(
        "sort_rows", implementation, functools.partial(why_not_sort, experts=experts), operands
    )


def check_gather(
    x: Any, weight: Any, sizes: Any, source: Any, bias: Any, gate: Any, gate_bias: Any
) -> None:
    """Raise a ``ValueError`` if operands do not match; they only need a shape and a dtype."""
    check_product(x, weight, sizes, bias)
    if source.ndim != 1:
        raise ValueError(f"source must have one dimension, got the shape {source.shape}")
    if gate is None:
        if gate_bias is not None:
            raise ValueError("gate_bias needs gate")
        return
    if gate.shape != weight.shape:
        raise ValueError(f"gate must have the shape of weight, {weight.shape}, got {gate.shape}")
    check_product(x, gate, sizes, gate_bias)


def check_scatter(h: Any, weight: Any, sizes: Any, target: Any, scale: Any, bias: Any) -> None:
    """Do the same for ``matmul_scatter``."""
    check_product(h, weight, sizes, bias)
    for name, value in (("target", target), ("scale", scale)):
        if value.shape != h.shape[:1]:
            raise ValueError(
                f"{name} must have one entry for each row of h {h.shape}, got the shape {value.shape}"
            )


def why_not_gather(name: str, x: Any, weight: Any, source: Any, gate: Any) -> str | None:
    """Return why an implementation of ``gather_matmul`` does not support these operands here, or None if it does."""
    if name != "tpu":
        return None
    if 0 in (*x.shape, *weight.shape, *source.shape):
        return f"x {x.shape}, weight {weight.shape} or source {source.shape} is empty"
    from kernels_pallas.expert_matmul.tpu import gather

    return dispatch.partitioned() or gather.why_not(x, weight, source, gate)


def why_not_scatter(name: str, h: Any, weight: Any, num_tokens: int) -> str | None:
    """Do the same for ``matmul_scatter``."""
    if name != "tpu":
        return None
    if 0 in (*h.shape, *weight.shape, num_tokens):
        return f"h {h.shape}, weight {weight.shape} or the result of {num_tokens} tokens is empty"
    from kernels_pallas.expert_matmul.tpu import scatter

    return dispatch.partitioned() or scatter.why_not(h, weight, num_tokens)


def why_not_sort(name: str, experts: Any) -> str | None:
    """Do the same for ``sort_rows``."""
    if name != "tpu":
        return None
    if experts.size == 0:
        return f"experts {experts.shape} is empty"
    from kernels_pallas.expert_matmul.tpu import rows

    return dispatch.partitioned() or rows.why_not(experts)


def _run(op: str, name: str | None, why_not: Any, operands: Any, *options: Any) -> Any:
    """Run the op by a named implementation, or by the best one for the platform that the program is lowered for."""
    plain = lambda *operands: getattr(reference, op)(*operands, *options)
    kernel = lambda *operands: _kernel(op, options, operands)
    functions = {"reference": lambda: plain, "tpu": lambda: kernel}
    return dispatch.by_implementation(op, name, functions, why_not, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel(op: str, options: Any, operands: Any) -> Any:
    from kernels_pallas.expert_matmul.tpu import gather, rows, scatter

    modules = {"gather_matmul": gather, "matmul_scatter": scatter, "sort_rows": rows}
    return getattr(modules[op], op)(*operands, *options)


def _forward(op: str, options: Any, operands: Any) -> tuple[Any, Any]:
    return _kernel(op, options, operands), operands


def _backward(op: str, options: Any, operands: Any, g: Any) -> tuple[Any]:
    plain = lambda operands: getattr(reference, op)(*operands, *options)
    return jax.vjp(plain, operands)[1](g)


_kernel.defvjp(_forward, _backward)
