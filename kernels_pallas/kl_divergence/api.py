"""The public function: checks, and the choice of an implementation."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import dispatch
from kernels_pallas.kl_divergence.chunked import chunked
from kernels_pallas.kl_divergence.output import Output
from kernels_pallas.kl_divergence.reference import reference

Implementation = Literal["reference", "chunked"]
FUNCTIONS: dict[str, Any] = {"reference": reference, "chunked": chunked}


def kl_divergence(
    hidden: Float[Array, "tokens d"],
    vocab_weight: Float[Array, "vocab d"],
    teacher_hidden: Float[Array, "tokens d_teacher"],
    teacher_vocab_weight: Float[Array, "vocab d_teacher"],
    *,
    weights: Float[Array, " tokens"] | None = None,
    bias: Float[Array, " vocab"] | None = None,
    teacher_bias: Float[Array, " vocab"] | None = None,
    temperature: float = 1.0,
    implementation: Implementation | None = None,
) -> Float[Array, ""]:
    r"""Sum the divergence of a model's next-token distribution from its teacher's over tokens.

    $$\sum_t w_t \, \mathrm{KL}(p^T_t \,\|\, p^S_t), \qquad p_t = \mathrm{softmax}(l_t / \tau), \quad l_t = W h_t + b$$

    Softmax and sums are float32. The teacher gets no gradient. The full logits never exist at the same time (except in the
    reference).

    Args:
        hidden: The student's final hidden states, float32 or bfloat16.
        vocab_weight: The student's output projection in the layout of an embedding table.
        teacher_hidden: The teacher's final hidden states.
        teacher_vocab_weight: The teacher's output projection.
        weights: float32 weight of each token; None gives every token the weight 1.
        bias: Bias of the student's logits.
        teacher_bias: Bias of the teacher's logits.
        temperature: Divisor of the logits, $\tau$. Gradients shrink with $1 / \tau^2$; distillation multiplies the sum by $\tau^2$.
        implementation: "reference" (whole logits), "chunked" (one chunk of tokens at a time), or None: "chunked".

    Returns:
        The float32 sum, in nats.

    Raises:
        ValueError: The vocabularies differ in size, other operands do not match, or the temperature is not above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kernels_pallas import kl_divergence
        >>> hidden, table = jnp.ones((3, 8)), jnp.eye(16, 8)
        >>> print(kl_divergence(hidden, table, hidden, table))
        0.0
    """
    dispatch.check_name(implementation, FUNCTIONS)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    check_operands(hidden, vocab_weight, teacher_hidden, teacher_vocab_weight)
    student = Output(hidden, vocab_weight, bias)
    teacher = jax.lax.stop_gradient(Output(teacher_hidden, teacher_vocab_weight, teacher_bias))
    weights = jnp.ones(hidden.shape[0], jnp.float32) if weights is None else weights
    return FUNCTIONS[implementation or "chunked"](student, teacher, weights, temperature)


def check_operands(
    hidden: Any, vocab_weight: Any, teacher_hidden: Any, teacher_weight: Any
) -> None:
    """Raise a ``ValueError`` if operands do not match; they only need a shape."""
    if vocab_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"the student must have the teacher's vocabulary of {teacher_weight.shape[0]}, got one of {vocab_weight.shape[0]}"
        )
    if hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"the student must have the teacher's {teacher_hidden.shape[0]} tokens, got {hidden.shape[0]}"
        )
    for who, x, weight in (
        ("student", hidden, vocab_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if x.shape[1] != weight.shape[1]:
            raise ValueError(
                f"the {who}'s hidden states and output projection must have the same width, got {x.shape} and {weight.shape}"
            )
