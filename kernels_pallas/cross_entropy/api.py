"""The public function: checks, the choice of an implementation, and their common gradient."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.cross_entropy import chunked
from kernels_pallas.cross_entropy.chunked import Gradients
from kernels_pallas.cross_entropy.reference import reference
from kernels_pallas.manual_axes import vary, varying_axes

Implementation = Literal["reference", "chunked", "tpu", "gpu"]
IMPLEMENTATIONS: tuple[str, ...] = ("reference", "chunked", "tpu", "gpu")

# If the sums over a vocabulary are in HBM, a few large chunks cost less memory traffic than many that
# fit in a cache.
_ACCELERATOR_CHUNK = 1024


def cross_entropy(
    hidden: Float[Array, "tokens d"],
    vocab_weight: Float[Array, "vocab d"],
    labels: Int[Array, " tokens"],
    *,
    weights: Float[Array, " tokens"] | None = None,
    bias: Float[Array, " vocab"] | None = None,
    z_loss: float = 0.0,
    token_axes: Sequence[str] = (),
    implementation: Implementation | None = None,
) -> Float[Array, ""]:
    r"""Sum the weighted softmax cross-entropy of ``hidden @ vocab_weight.T + bias`` over tokens.

    $$\sum_t w_t \, (\mathrm{lse}_t - l_{t, y_t} + z \, \mathrm{lse}_t^2), \qquad
        l_t = W h_t + b, \quad \mathrm{lse}_t = \log \sum_v e^{l_{t,v}}$$

    The full float32 logits never exist at the same time (except in the reference). The matrix products
    take operands in the dtype of ``hidden`` (``vocab_weight`` is cast to it) and accumulate in float32.
    Softmax and loss are float32. Each gradient has the dtype of its operand, so a float32
    ``vocab_weight`` gets a float32 gradient even if ``hidden`` is bfloat16. The op is differentiable
    once, in reverse mode, in ``hidden``, ``vocab_weight``, ``bias`` and ``weights``.

    Args:
        hidden: Final hidden states, float32 or bfloat16.
        vocab_weight: The output projection in the layout of an embedding table, float32 or
            bfloat16.
        labels: Target ids. A token whose label is outside [0, vocab) is ignored: its weight counts
            as 0. This covers the usual -100, and a label beyond the vocabulary cannot read another row.
        weights: float32 weight of each token; None gives every token the weight 1.
        bias: Bias of the logits.
        z_loss: Coefficient of the squared log normalizer, which keeps the logits from drifting
            (1e-4 in PaLM).
        token_axes: Mesh axes that shard the tokens, for use under a mesh whose axes the compiler
            partitions. Each device then processes its own tokens, and the gradient of ``vocab_weight``
            is summed over the devices once instead of once per chunk. Without it, the result is the
            same but needs more communication.
        implementation: "reference" (plain jnp, whole logits), "chunked" (jnp, one chunk of tokens at
            a time), "tpu" or "gpu" (Pallas kernels), or None: the best one for the platform that the
            program is lowered for.

    Returns:
        The float32 sum of the weighted losses. For the mean, divide by the sum of the weights of the
        tokens that count.

    Raises:
        ValueError: An operand has an invalid shape or dtype, ``z_loss`` is negative, or a name is
            unknown.
        NotImplementedError: The named implementation does not support these operands.

    Examples:
        >>> import jax.numpy as jnp, kernels_pallas
        >>> hidden, table = jnp.zeros((3, 8)), jnp.zeros((16, 8))
        >>> loss = kernels_pallas.cross_entropy(hidden, table, jnp.array([0, 5, -100]))
        >>> print(f"{loss:.4f} = 2 ln 16")
        5.5452 = 2 ln 16

    References:
        Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways" (2022), section 5, for the z-loss.
            https://arxiv.org/abs/2204.02311
    """
    dispatch.check_name(implementation, IMPLEMENTATIONS)
    check_operands(hidden, vocab_weight, labels, weights, bias, z_loss)
    if weights is None:
        weights = jnp.ones(labels.shape, jnp.float32)
    operands = (hidden, vocab_weight, bias, labels, weights)
    return _on_device(
        implementation, float(z_loss), _shardable(token_axes, hidden.shape[0]), operands
    )


def check_operands(
    hidden: Any, vocab_weight: Any, labels: Any, weights: Any, bias: Any, z_loss: float
) -> None:
    """Raise a ``ValueError`` if operands do not match; they only need a shape and a dtype."""
    if (
        len(hidden.shape) != 2
        or len(vocab_weight.shape) != 2
        or hidden.shape[1] != vocab_weight.shape[1]
    ):
        raise ValueError(
            f"hidden and vocab_weight must be [tokens, d] and [vocab, d] with the same d, got {hidden.shape} and {vocab_weight.shape}."
            " Reshape [batch, seq, d] to [batch * seq, d], and transpose a [d, vocab] kernel."
        )
    expected = {"labels": (labels, hidden.shape[0]), "weights": (weights, hidden.shape[0])}
    for name, (value, size) in {**expected, "bias": (bias, vocab_weight.shape[0])}.items():
        if value is not None and tuple(value.shape) != (size,):
            raise ValueError(f"{name} must have the shape ({size},), got {value.shape}.")
    for name, value in {"hidden": hidden, "vocab_weight": vocab_weight, "bias": bias}.items():
        if value is not None and value.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name} must be float32 or bfloat16, got {value.dtype}.")
    if weights is not None and weights.dtype != jnp.float32:
        raise ValueError(f"weights must be float32, the dtype of the loss, got {weights.dtype}.")
    if not jnp.issubdtype(labels.dtype, jnp.signedinteger):
        raise ValueError(
            f"labels must have a signed integer dtype, such as int32, because negative labels are ignored, got {labels.dtype}."
        )
    if z_loss < 0:
        raise ValueError(f"z_loss must be at least 0 (0 disables the term), got {z_loss}.")


def why_not(name: str, hidden: Any, vocab_weight: Any) -> str | None:
    """Return why an implementation does not support these operands here, or None if it does."""
    if name not in ("tpu", "gpu"):
        return None
    if axes := dispatch.auto_partitioned():
        return (
            f"the mesh axes {axes} are partitioned by the compiler, which cannot split a Pallas kernel; name the axes that"
            " shard the tokens in token_axes, or call it inside jax.shard_map over all of them"
        )
    if 0 in hidden.shape or 0 in vocab_weight.shape:
        return f"hidden {hidden.shape} or vocab_weight {vocab_weight.shape} is empty"
    if name == "tpu":
        from kernels_pallas.cross_entropy import tpu

        return tpu.why_not(hidden, vocab_weight)
    return None


def _shardable(token_axes: Sequence[str], tokens: int) -> tuple[str, ...]:
    """Return those of ``token_axes`` that the current mesh has and the compiler partitions."""
    if isinstance(token_axes, str):
        raise ValueError(
            f"token_axes must be a tuple of axis names, such as ({token_axes!r},), got {token_axes!r}."
        )
    axes = tuple(axis for axis in token_axes if axis in dispatch.auto_partitioned())
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1
    for axis in axes:
        shards *= mesh.shape[axis]
    if tokens % shards:
        raise ValueError(
            f"token_axes={axes} split {tokens} tokens into {shards} unequal parts. Use a multiple of {shards} tokens,"
            " or omit token_axes."
        )
    return axes


def _on_device(implementation, z_loss, axes, operands):
    """Apply the rule for ignored labels, then choose and run an implementation."""
    hidden, vocab_weight, bias, labels, weights = operands
    if implementation == "reference":
        return reference(hidden, vocab_weight, bias, labels, weights, z_loss=z_loss)
    labels = labels.astype(jnp.int32)
    counted = (labels >= 0) & (labels < vocab_weight.shape[0])
    labels, weights = jnp.where(counted, labels, -1), jnp.where(counted, weights, 0.0)
    # Inside a shard_map, all operands are given the same type here, so that the following code does not
    # depend on it; `vary` sums their gradients.
    operands = (hidden, vocab_weight, bias, labels, weights)
    operands = vary(operands, varying_axes(operands))
    return _summed(implementation, z_loss, axes, *operands)


def _over_tokens(call, axes, operands, *, gradients):
    """Call ``call`` on each device's own tokens and sum the shared results; without axes, just call it.

    The custom gradient is around this function, because JAX cannot differentiate a shard_map inside another.
    """
    if not axes:
        return call(*operands)
    mesh = jax.sharding.get_abstract_mesh()
    single = {name for name in mesh.axis_names if mesh.shape[name] == 1}
    manual = {*axes, *(single - set(mesh.manual_axes))}
    in_specs = (P(axes), P(), P(), P(axes), P(axes))
    of_gradients: Any = (P(axes), P(), P(), P(axes))
    out_specs = (P(), Gradients(*of_gradients)) if gradients else P()

    @jax.shard_map(in_specs=in_specs, out_specs=out_specs, axis_names=manual)
    def on_each(*operands):
        result = call(*vary(operands, axes))
        if not gradients:
            return jax.lax.psum(result, axes)
        loss, (hidden, vocab_weight, bias, weights) = result
        loss, vocab_weight, bias = jax.lax.psum((loss, vocab_weight, bias), axes)
        return loss, Gradients(hidden, vocab_weight, bias, weights)

    return on_each(*operands)


def _functions(implementation, z_loss, hidden, vocab_weight, *, gradients: bool) -> dict[str, Any]:
    """Return one function per platform, from operands to the loss, or to the loss and its gradients."""
    if implementation in ("tpu", "gpu"):
        names = {"default": implementation}
    else:
        names = {"default": "chunked", "cpu": "chunked"}
        if implementation is None and why_not("tpu", hidden, vocab_weight) is None:
            names["tpu"] = "tpu"
        if (
            implementation is None
            and dispatch.hopper_in_use()
            and why_not("gpu", hidden, vocab_weight) is None
        ):
            names["cuda"] = "gpu"
    return {
        platform: _function(name, z_loss, gradients, platform) for platform, name in names.items()
    }


def _function(name, z_loss, gradients, platform):
    if name == "tpu":
        from kernels_pallas.cross_entropy import tpu

        function = tpu.tpu_loss_and_gradients if gradients else tpu.tpu_loss
        return functools.partial(function, z_loss=z_loss)
    if name == "gpu":
        from kernels_pallas.cross_entropy import gpu

        function = gpu.gpu_loss_and_gradients if gradients else gpu.gpu_loss
        return functools.partial(function, z_loss=z_loss)
    function = chunked.chunked_loss_and_gradients if gradients else chunked.chunked_loss
    return functools.partial(
        function, z_loss=z_loss, chunk_tokens=None if platform == "cpu" else _ACCELERATOR_CHUNK
    )


def _run(implementation, z_loss, axes, operands, *, gradients):
    def call(*operands):
        # Inside the shard_map over the tokens, if there is one, because kernels can run only there.
        if implementation is not None and (reason := why_not(implementation, *operands[:2])):
            raise dispatch.Unsupported(
                f"cross_entropy: implementation={implementation!r} is not supported here: {reason}."
            )
        functions = _functions(implementation, z_loss, *operands[:2], gradients=gradients)
        return dispatch.by_platform(functions, *operands)

    return _over_tokens(call, axes, operands, gradients=gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _summed(implementation, z_loss, axes, *operands):
    return _run(implementation, z_loss, axes, operands, gradients=False)


def _summed_forward(implementation, z_loss, axes, *operands):
    return _run(implementation, z_loss, axes, operands, gradients=True)


def _summed_backward(implementation, z_loss, axes, gradients, cotangent):
    def scaled(gradient):
        return (
            None
            if gradient is None
            else (gradient.astype(jnp.float32) * cotangent).astype(gradient.dtype)
        )

    hidden, vocab_weight, bias, weights = (scaled(gradient) for gradient in gradients)
    return hidden, vocab_weight, bias, None, weights


_summed.defvjp(_summed_forward, _summed_backward)
