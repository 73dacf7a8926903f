"""The public function: checks, the choice of an implementation, and the differentiation rule."""

import functools
from typing import Any, Literal

import jax
from jaxtyping import Array, Bool, Float

from kernels_pallas import dispatch
from kernels_pallas.top_k_gating import reference
from kernels_pallas.top_k_gating.reference import Gating

Implementation = Literal["reference", "tpu"]
IMPLEMENTATIONS: tuple[str, ...] = ("reference", "tpu")


def top_k_gating(
    logits: Float[Array, "tokens experts"],
    k: int,
    used: Bool[Array, " tokens"] | None = None,
    *,
    normalize: bool = False,
    implementation: Implementation | None = None,
) -> Gating:
    r"""Choose the k most probable experts of each token, and its position among the tokens that chose the same expert.

    $$p_{te} = \frac{e^{l_{te}}}{\sum_f e^{l_{tf}}}, \qquad
        \text{position}_{tj} = \big|\{ s < t : e_{tj} \text{ is one of the experts of } s \}\big|$$

    So each expert counts its tokens in order, and no token is dropped. Among equal logits, the expert with the lower number
    comes first. Differentiable in ``logits`` through the weights; the choice has no gradient.

    There is no GPU kernel. The count runs from the first token to the last, but the blocks of a Mosaic GPU kernel run in
    parallel and in any order. It would take either a single block, which leaves all but one multiprocessor idle, or a
    second pass over the tokens, which XLA also generates from the plain implementation.

    Args:
        logits: float32 logits of each expert for each token.
        k: Number of experts per token.
        used: False at padding, which no expert counts. None: all tokens are real.
        normalize: Whether to divide the weights of each token by their sum.
        implementation: "reference" (plain jnp), "tpu" (a Pallas kernel), or None: the best one for the platform that the
            program is lowered for.

    Returns:
        ``weights``, float32, the probabilities of the chosen experts, highest first, and 0 at padding; ``experts``, int32,
        their numbers, and the number of experts at padding; ``positions``, int32, 0 at padding; and ``sizes``, int32, the
        number of tokens that chose each expert.

    Raises:
        ValueError: k is not from 1 to the number of experts, logits are not float32, or a name is unknown.
        NotImplementedError: The named implementation does not support these operands here.

    Examples:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[2.0, 1.0, 0.0], [1.5, 1.0, 0.5], [3.0, 0.0, 1.0]])
        >>> gating = top_k_gating(logits, 2)
        >>> gating.experts.tolist(), gating.positions.tolist(), gating.sizes.tolist()
        ([[0, 1], [0, 1], [0, 2]], [[0, 0], [1, 1], [2, 0]], [3, 2, 1])


    References:
        Rajbhandari et al., "DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI
            Scale" (2022), section 5.4. https://arxiv.org/abs/2201.05596
    """
    dispatch.check_name(implementation, IMPLEMENTATIONS)
    check_operands(logits, k, used)
    return dispatch.by_implementation(
        "top_k_gating",
        implementation,
        {name: functools.partial(_function, name) for name in IMPLEMENTATIONS},
        lambda name: why_not(name, logits),
        (logits, used),
        k=k,
        normalize=normalize,
    )


def check_operands(logits: Any, k: int, used: Any) -> None:
    """Raise a ``ValueError`` if operands do not match; they only need a shape and a dtype."""
    num_tokens, num_experts = logits.shape
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must be from 1 to the number of experts, {num_experts}, got {k}")
    if logits.dtype != "float32":
        raise ValueError(f"logits must be float32, got {logits.dtype}")
    if used is not None and used.shape != (num_tokens,):
        raise ValueError(f"used must have the shape ({num_tokens},), got {used.shape}")


def why_not(name: str, logits: Any) -> str | None:
    """Return why an implementation does not support these operands here, or None if it does."""
    if name != "tpu":
        return None
    if 0 in logits.shape:
        return f"logits {logits.shape} is empty"
    from kernels_pallas.top_k_gating import tpu

    return dispatch.partitioned() or tpu.why_not(logits.shape[1])


def _function(name: str) -> Any:
    if name == "tpu":
        return lambda logits, used, *, k, normalize: _tpu(logits, used, k, normalize)
    return reference.top_k_gating


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _tpu(logits: Array, used: Array | None, k: int, normalize: bool) -> Gating:
    from kernels_pallas.top_k_gating import tpu

    return tpu.top_k_gating(logits, used, k=k, normalize=normalize)


def _forward(logits: Array, used: Array | None, k: int, normalize: bool) -> tuple[Gating, Any]:
    return _tpu(logits, used, k, normalize), (logits, used)


def _backward(k: int, normalize: bool, kept: Any, g: Gating) -> tuple[Array, None]:
    logits, used = kept
    weights = lambda logits: reference.top_k_gating(logits, used, k=k, normalize=normalize).weights
    return jax.vjp(weights, logits)[1](g.weights)[0], None


_tpu.defvjp(_forward, _backward)
