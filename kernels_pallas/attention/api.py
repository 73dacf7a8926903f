"""The public function: checks, and the choice of an implementation."""

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
    r"""Softmax attention of each token to those of its row, without the array of all scores where a kernel serves.

    $$o_i = \sum_j \mathrm{softmax}_j (q_i \cdot k_j + m p_j) \, v_j$$

    over the $j$ that $i$ may see; $m p_j$ is the bias of ALiBi, if there is one. Sums and softmax are in
    float32. Each query head of a group reads the key head of the group (grouped queries). Differentiable, once, in
    query, keys and values.

    Args:
        query: Already scaled, so commonly divided by the root of `head_dim`.
        keys: As many heads as the query or a divisor of it.
        values: As many as the keys.
        causal: Whether a token sees only itself and those before it.
        segments: A token sees only those of its own number. Give padding a number that no real token has. None: all of a
            row are one segment.
        alibi: Slopes and positions of a bias.
        row_axes: Mesh axes that divide the batch, for use under a mesh whose axes the compiler partitions. An axis
            that does not divide it is left out, and its devices then do the same work.
        head_axes: The same for the heads.
        implementation: "reference" (plain jnp, all scores), "splash" (TPU), "cudnn" (Hopper GPUs) or None: splash where
            it can serve and the mesh in use is of TPUs or, without a mesh, this process has TPUs and lowers the program
            for them; `fallback` otherwise. cuDNN is taken only by its name, as it has not run on a GPU yet.
        fallback: From query, keys and values to the output, in place of "reference" where no kernel serves.

    Returns:
        The output, in the type of the query.

    Raises:
        ValueError: Operands that cannot go together, or an unknown name.
        NotImplementedError: The named implementation cannot serve these operands here.

    Examples:
        >>> import jax.numpy as jnp, kernels_pallas
        >>> x = jnp.linspace(-1.0, 1.0, 8).reshape(1, 1, 4, 2)
        >>> out = kernels_pallas.attention(x, x, x)
        >>> bool((out[0, 0, 0] == x[0, 0, 0]).all())  # the first token sees only itself
        True

    References:
        Dao, `FlashAttention-2 <https://arxiv.org/abs/2307.08691>`_; Press et al., `Train Short, Test Long
        <https://arxiv.org/abs/2108.12409>`_ (ALiBi).
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
                f"attention: implementation={implementation!r} cannot serve: {reason}."
            )
        return run(tpu if implementation == "splash" else gpu)(query, keys, values)
    platform = dispatch.mesh_platform()
    if platform is None and jax.default_backend() != "tpu":
        # Without a mesh of TPUs and without a TPU here, the fallback alone: it can be differentiated as often as one likes.
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
    """The reason why an implementation cannot serve these operands here, or None if it can."""
    if name not in ("splash", "cudnn"):
        return None
    if 0 in query.shape:
        return f"the query {query.shape} is empty"
    if not query.dtype == keys.dtype == values.dtype:
        return f"query, keys and values are of several types, {query.dtype}, {keys.dtype}, {values.dtype}"
    if alibi is not None and query.shape[2] > MAX_POSITION:
        return f"ALiBi is exact to {MAX_POSITION} positions, and seq={query.shape[2]}"
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and AxisType.Explicit in mesh.axis_types:
        return f"the mesh {dict(mesh.shape)} has axes of Explicit type; make it of Auto axes"
    if not auto_axes() and varying_axes(query, keys, values):
        return (
            "it is called in a checked jax.shard_map over all mesh axes, and does not say what its results vary over; "
            "leave out an axis (one of size 1 will do), or use check_vma=False"
        )
    wide = query.shape[3] + (FEATURES if alibi is not None else 0)
    return tpu.why_not(query, wide) if name == "splash" else gpu.why_not(query, wide, segments)


def check_operands(query: Any, keys: Any, values: Any, segments: Any, alibi: Alibi | None) -> None:
    """Raise a `ValueError` if operands cannot go together; all they need is shape and dtype."""
    batch, heads, seq, width = query.shape
    if keys.shape != values.shape or keys.shape[::2] != (batch, seq) or keys.shape[3] != width:
        raise ValueError(
            f"query {query.shape}, keys {keys.shape} and values {values.shape} must be [batch, heads, seq, head_dim], alike "
            "but for the heads"
        )
    if keys.shape[1] == 0 or heads % keys.shape[1]:
        raise ValueError(f"{keys.shape[1]} key heads must divide the {heads} query heads")
    if segments is not None and segments.shape != (batch, seq):
        raise ValueError(f"segments {segments.shape} must be {(batch, seq)} here")
    if alibi is not None and alibi.slopes.shape != (heads,):
        raise ValueError(f"slopes {alibi.slopes.shape} must be one for each of {heads} heads")
