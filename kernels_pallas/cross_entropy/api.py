"""The public function: checks, choice of an implementation, and the gradient they share."""

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

# Where the sums over a vocabulary live in HBM, few large chunks cost less traffic than many that
# fit a cache.
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
    r"""Sum over tokens of the weighted softmax cross entropy of `hidden @ vocab_weight.T + bias`.

    $$\sum_t w_t \, (\mathrm{lse}_t - l_{t, y_t} + z \, \mathrm{lse}_t^2), \qquad
        l_t = W h_t + b, \quad \mathrm{lse}_t = \log \sum_v e^{l_{t,v}}$$

    The logits never exist all at once in float32 (except in the reference). The matrix products
    take operands in the type of `hidden` (`vocab_weight` is cast to it) and sum in float32;
    softmax and loss are float32; each gradient has the type of its operand, so a float32
    `vocab_weight` gets a float32 gradient under bfloat16 `hidden`. Differentiable (once, in
    reverse mode) in `hidden`, `vocab_weight`, `bias` and `weights`.

    Args:
        hidden: Final hidden states, float32 or bfloat16.
        vocab_weight: The output projection in the layout of an embedding table, float32 or
            bfloat16.
        labels: Target ids. A token whose label is outside [0, vocab) is ignored: its weight counts
            as 0. That covers the customary -100, and keeps a label beyond the vocabulary from
            reading another row.
        weights: float32 weight of each token; None weighs every token 1.
        bias: Bias of the logits.
        z_loss: Coefficient of the squared log normalizer, which keeps the logits from drifting
            (1e-4 in PaLM).
        token_axes: Mesh axes that shard the tokens, for use under a mesh whose axes the compiler
            partitions. Each device then handles its own tokens and the gradient of `vocab_weight`
            is summed over the devices once, instead of once a chunk. Without it the result is the
            same and the communication more.
        implementation: "reference" (plain jnp, whole logits), "chunked" (jnp, a chunk of tokens at
            a time), "tpu" or "gpu" (Pallas kernels), or None: the best one that can serve on the
            platform the program is lowered for.

    Returns:
        The float32 sum of the weighted losses. Divide by the sum of the weights of the counted
        tokens for the mean.

    Raises:
        ValueError: An operand has an impossible shape or type, `z_loss` is negative, a name is
            unknown.
        NotImplementedError: The named implementation cannot serve these operands.

    Examples:
        >>> import jax.numpy as jnp, kernels_pallas
        >>> hidden, table = jnp.zeros((3, 8)), jnp.zeros((16, 8))
        >>> loss = kernels_pallas.cross_entropy(hidden, table, jnp.array([0, 5, -100]))
        >>> print(f"{loss:.4f} = 2 ln 16")
        5.5452 = 2 ln 16

    References:
        Chowdhery et al, `PaLM: Scaling Language Modeling with Pathways
        <https://arxiv.org/abs/2204.02311>`_, section 5 (z-loss).
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
    """Raise a `ValueError` if operands cannot go together; all they need is shape and dtype."""
    if (
        len(hidden.shape) != 2
        or len(vocab_weight.shape) != 2
        or hidden.shape[1] != vocab_weight.shape[1]
    ):
        raise ValueError(
            f"hidden {hidden.shape} and vocab_weight {vocab_weight.shape} must be [tokens, d] and [vocab, d] with one d;"
            " reshape [batch, seq, d] to [batch * seq, d], and transpose a [d, vocab] kernel."
        )
    expected = {"labels": (labels, hidden.shape[0]), "weights": (weights, hidden.shape[0])}
    for name, (value, size) in {**expected, "bias": (bias, vocab_weight.shape[0])}.items():
        if value is not None and tuple(value.shape) != (size,):
            raise ValueError(f"{name} has shape {value.shape}, and must be ({size},) here.")
    for name, value in {"hidden": hidden, "vocab_weight": vocab_weight, "bias": bias}.items():
        if value is not None and value.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name} is {value.dtype}; cast it to float32 or bfloat16.")
    if weights is not None and weights.dtype != jnp.float32:
        raise ValueError(f"weights is {weights.dtype}; cast it to float32, the type of the loss.")
    if not jnp.issubdtype(labels.dtype, jnp.signedinteger):
        raise ValueError(
            f"labels is {labels.dtype}; cast it to int32 (a signed type, since negative labels are ignored)."
        )
    if z_loss < 0:
        raise ValueError(f"z_loss={z_loss} must be at least 0, which leaves the term out.")


def why_not(name: str, hidden: Any, vocab_weight: Any) -> str | None:
    """The reason why an implementation cannot serve these operands here, or None if it can."""
    if name not in ("tpu", "gpu"):
        return None
    if axes := dispatch.auto_partitioned():
        return (
            f"the mesh axes {axes} are partitioned by the compiler, which cannot split a Pallas kernel; name the axes that"
            " shard the tokens in token_axes, or call it within jax.shard_map over all of them"
        )
    if 0 in hidden.shape or 0 in vocab_weight.shape:
        return f"hidden {hidden.shape} or vocab_weight {vocab_weight.shape} is empty"
    if name == "tpu":
        from kernels_pallas.cross_entropy import tpu

        return tpu.why_not(hidden, vocab_weight)
    return None


def _shardable(token_axes: Sequence[str], tokens: int) -> tuple[str, ...]:
    """Those of `token_axes` that the ambient mesh has and the compiler partitions."""
    if isinstance(token_axes, str):
        raise ValueError(
            f"token_axes={token_axes!r} must be a tuple of axis names: ({token_axes!r},)."
        )
    axes = tuple(axis for axis in token_axes if axis in dispatch.auto_partitioned())
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1
    for axis in axes:
        shards *= mesh.shape[axis]
    if tokens % shards:
        raise ValueError(
            f"token_axes={axes} split {tokens} tokens into {shards} unequal parts; use a multiple of {shards} tokens,"
            " or leave token_axes out."
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
    # Within a shard_map all operands take one type here, so that what follows need not know;
    # `vary` sums their gradients.
    operands = (hidden, vocab_weight, bias, labels, weights)
    operands = vary(operands, varying_axes(operands))
    return _summed(implementation, z_loss, axes, *operands)


def _over_tokens(call, axes, operands, *, gradients):
    """Call on each device's own tokens, and sum what belongs to all; `call` itself without axes.

    The custom gradient is around this, as JAX cannot differentiate a shard_map within another.
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
    """One function a platform, from operands to the loss, or to the loss and its gradients."""
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
        # Within the shard_map over the tokens, if there is one: kernels can serve only there.
        if implementation is not None and (reason := why_not(implementation, *operands[:2])):
            raise dispatch.Unsupported(
                f"cross_entropy: implementation={implementation!r} cannot serve: {reason}."
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
