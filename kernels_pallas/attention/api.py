"""The public function: checks and the choice of an implementation."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.attention import gpu, tpu
from kernels_pallas.attention.alibi import FEATURES, MAX_POSITION, Alibi, with_features
from kernels_pallas.attention.fused import Plan, auto_axes, dividing, fused
from kernels_pallas.attention.reference import reference
from kernels_pallas.manual_axes import varying_axes

Implementation = Literal["reference", "splash", "cudnn"]
IMPLEMENTATIONS: tuple[str, ...] = ("reference", "splash", "cudnn")


def attention(
    query: Float[Array, "batch heads seq head_dim"],
    keys: Float[Array, "batch kv_heads seq head_dim"],
    values: Float[Array, "batch kv_heads seq head_dim"],
    *,
    causal: bool = True,
    segments: Int[Array, "batch seq"] | None = None,
    alibi: Alibi | None = None,
    row_axes: Sequence[str] = (),
    head_axes: Sequence[str] = (),
    implementation: Implementation | None = None,
    fallback: Callable[[Array, Array, Array], Array] | None = None,
) -> Float[Array, "batch heads seq head_dim"]:
    r"""Compute softmax attention within each row, without an array of all scores if a kernel supports the operands.

    $$o_i = \sum_j \mathrm{softmax}_j (q_i \cdot k_j + m p_j) \, v_j$$

    over the $j$ that $i$ may see; $m p_j$ is the bias of ALiBi, if there is one. Sums and softmax are in
    float32. Each query head of a group uses the key head of the group (grouped-query attention). The op is differentiable
    once, in query, keys and values.

    Args:
        query: Queries, already scaled (usually divided by the square root of ``head_dim``).
        keys: Keys; their number of heads must divide that of the query.
        values: Values, with the same number of heads as the keys.
        causal: Whether a token attends only to itself and earlier tokens.
        segments: Segment number of each token; a token attends only to its own segment. Give padding a number that no real
            token has. None: each row is one segment.
        alibi: Slopes and positions of a bias.
        row_axes: Mesh axes that divide the batch, for use under a mesh whose axes the compiler partitions. An axis
            that does not divide it is ignored, and its devices then do the same work.
        head_axes: The same for the heads.
        implementation: "reference" (plain jnp, all scores), "splash" (TPU), "cudnn" (Hopper GPUs) or None. None uses
            splash if it supports the operands and the current mesh consists of TPUs or, without a mesh, this process has
            TPUs and lowers the program for them; otherwise it uses ``fallback``. cuDNN is used only if named, because it
            has not run on a GPU yet.
        fallback: Function of query, keys and values to use in place of "reference" if no kernel supports the operands.

    Returns:
        The output, in the dtype of the query.

    Raises:
        ValueError: The operands do not match, or a name is unknown.
        NotImplementedError: The named implementation does not support these operands here.

    Examples:
        >>> import jax.numpy as jnp, kernels_pallas
        >>> x = jnp.linspace(-1.0, 1.0, 8).reshape(1, 1, 4, 2)
        >>> out = kernels_pallas.attention(x, x, x)
        >>> bool((out[0, 0, 0] == x[0, 0, 0]).all())  # the first token attends only to itself
        True

    References:
        Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023).
            https://arxiv.org/abs/2307.08691
        Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation" (2021), for
            ALiBi. https://arxiv.org/abs/2108.12409
    """
    dispatch.check_name(implementation, IMPLEMENTATIONS)
    check_operands(query, keys, values, segments, alibi)
    plain = fallback or functools.partial(reference, causal=causal, segments=segments, alibi=alibi)
    if implementation == "reference":
        return reference(query, keys, values, causal=causal, segments=segments, alibi=alibi)

    def run(kernel: Any) -> Callable[[Array, Array, Array], Array]:
        def call(query, keys, values):
            rows = dividing(row_axes, query.shape[0])
            heads = dividing([a for a in head_axes if a not in rows], query.shape[1])
            if alibi is not None:
                query, keys = with_features(query, keys, alibi)
            plan = Plan(kernel=kernel, causal=causal, rows=rows, heads=heads)
            return fused(plan, query, keys, values, segments)

        return call

    if implementation is not None:
        if reason := why_not(implementation, query, keys, values, segments, alibi):
            raise dispatch.Unsupported(
                f"attention: implementation={implementation!r} is not supported here: {reason}."
            )
        return run(tpu if implementation == "splash" else gpu)(query, keys, values)
    platform = dispatch.mesh_platform()
    if platform is None and jax.default_backend() != "tpu":
        # Without a mesh of TPUs and without a TPU here, use only the fallback, which can be differentiated any number of times.
        platform = jax.default_backend()
    if platform not in ("tpu", None) or why_not("splash", query, keys, values, segments, alibi):
        return plain(query, keys, values)
    if platform == "tpu":
        return run(tpu)(query, keys, values)
    functions = {"default": plain, "tpu": run(tpu)}
    return dispatch.by_platform(functions, query, keys, values)


def why_not(
    name: str, query: Any, keys: Any, values: Any, segments: Any = None, alibi: Alibi | None = None
) -> str | None:
    """Return why an implementation does not support these operands here, or None if it does."""
    if name not in ("splash", "cudnn"):
        return None
    if 0 in query.shape:
        return f"the query {query.shape} is empty"
    if not query.dtype == keys.dtype == values.dtype:
        return f"query, keys and values have different dtypes, {query.dtype}, {keys.dtype}, {values.dtype}"
    if alibi is not None and query.shape[2] > MAX_POSITION:
        return f"ALiBi is exact up to {MAX_POSITION} positions, and seq={query.shape[2]}"
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and AxisType.Explicit in mesh.axis_types:
        return f"the mesh {dict(mesh.shape)} has axes of Explicit type; use Auto axes"
    if not auto_axes() and varying_axes(query, keys, values):
        return (
            "it is called in a checked jax.shard_map over all mesh axes and does not declare what its results vary over; "
            "leave out an axis (one of size 1 is enough), or use check_vma=False"
        )
    wide = query.shape[3] + (FEATURES if alibi is not None else 0)
    return tpu.why_not(query, wide) if name == "splash" else gpu.why_not(query, wide, segments)


def check_operands(query: Any, keys: Any, values: Any, segments: Any, alibi: Alibi | None) -> None:
    """Raise a ``ValueError`` if operands do not match; they only need a shape and a dtype."""
    batch, heads, seq, width = query.shape
    if keys.shape != values.shape or keys.shape[::2] != (batch, seq) or keys.shape[3] != width:
        raise ValueError(
            f"query, keys and values must be [batch, heads, seq, head_dim] and differ only in the heads, got {query.shape}, "
            f"{keys.shape} and {values.shape}"
        )
    if keys.shape[1] == 0 or heads % keys.shape[1]:
        raise ValueError(
            f"the number of key heads must divide the {heads} query heads, got {keys.shape[1]}"
        )
    if segments is not None and segments.shape != (batch, seq):
        raise ValueError(f"segments must have the shape {(batch, seq)}, got {segments.shape}")
    if alibi is not None and alibi.slopes.shape != (heads,):
        raise ValueError(
            f"slopes must have one entry for each of {heads} heads, got {alibi.slopes.shape}"
        )
