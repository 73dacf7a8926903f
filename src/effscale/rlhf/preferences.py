"""Losses on preference pairs: for a reward model, and for a policy without a reward model (DPO)."""

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effscale.options import Bounds, NonNegativeFloat, PositiveFloat, checked


def pairwise_loss(
    chosen: Float[Array, "pairs"],
    rejected: Float[Array, "pairs"],
    *,
    margin: Float[Array, "pairs"] | float = 0.0,
    center: float = 0.0,
) -> Float[Array, ""]:
    r"""Compute the loss of a reward model from the scores of whole responses (Bradley-Terry).

    $$L = \mathrm{mean}\bigl(-\log \sigma(s_c - s_r - m) + c\, (s_c + s_r)^2\bigr)$$

    Args:
        chosen: Scores of the preferred responses.
        rejected: Scores of the others.
        margin: By how much the score of the preferred response should be higher, m; one per pair, or one for all.
        center: Weight of the term that keeps the scores of a pair around 0, c; 0.01 is a common value.

    References:
        Touvron et al., "Llama 2: Open Foundation and Fine-Tuned Chat Models" (2023), section 3.2.2, for ``margin``.
            https://arxiv.org/abs/2307.09288
        Eisenstein et al., "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking"
            (2023), for ``center``. https://arxiv.org/abs/2312.09244

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{pairwise_loss(jnp.zeros(2), jnp.zeros(2)):.4f}")  # ln 2
        0.6931
    """
    center = checked("center", center, NonNegativeFloat)
    losses = -jax.nn.log_sigmoid(chosen - rejected - margin)
    return (losses + center * jnp.square(chosen + rejected)).mean()


def token_pairwise_loss(
    chosen: Float[Array, "pairs length"],
    rejected: Float[Array, "pairs length"],
    where: Bool[Array, "pairs length"],
) -> Float[Array, ""]:
    r"""Compute the loss of a reward model from the scores after each token, as in DeepSpeed-Chat.

    It is the mean of $-\log \sigma(c_t - r_t)$ over the positions that count, computed for each pair and averaged over pairs.

    Args:
        chosen: A score after each token of the preferred response, prompt included.
        rejected: The same for the other response.
        where: True at the positions that count, see ``diverging``.

    References:
        Yao et al., "DeepSpeed-Chat: Easy, Fast and Affordable RLHF Training of ChatGPT-like Models at All Scales"
            (2023). https://arxiv.org/abs/2308.01320
    """
    losses = jnp.where(where, -jax.nn.log_sigmoid(chosen - rejected), 0.0).sum(1)
    return (losses / jnp.maximum(where.sum(1), 1).astype(losses.dtype)).mean()


def diverging(
    chosen: Int[Array, "pairs length"],
    rejected: Int[Array, "pairs length"],
    chosen_lengths: Int[Array, "pairs"],
    rejected_lengths: Int[Array, "pairs"],
) -> Bool[Array, "pairs length"]:
    """Return a mask from the first token where two responses differ to the end of the longer one.

    For a pair without a difference, it is true only at the last position of the row, where both scores are the same,
    as in DeepSpeed-Chat. The padding of the shorter response counts too.

    Args:
        chosen: Tokens of prompt and preferred response, padded on the right.
        rejected: The same for the other response.
        chosen_lengths: Number of tokens of each row without padding.
        rejected_lengths: The same for the other response.

    Example:
        >>> import jax.numpy as jnp
        >>> a, b = jnp.array([[5, 6, 7, 0]]), jnp.array([[5, 8, 0, 0]])
        >>> diverging(a, b, jnp.array([3]), jnp.array([2])).tolist()
        [[False, True, True, False]]
    """
    length = chosen.shape[1]
    place = jnp.arange(length, dtype=jnp.int32)[None]
    differs = chosen != rejected
    same = ~differs.any(1)
    first = jnp.where(same, length - 1, differs.argmax(1))
    end = jnp.where(same, length, jnp.maximum(chosen_lengths, rejected_lengths))
    return (place >= first[:, None]) & (place < end[:, None])


def pairwise_accuracy(
    chosen: Float[Array, "pairs"], rejected: Float[Array, "pairs"]
) -> Float[Array, ""]:
    """Compute the share of pairs in which the preferred response has the higher score; equal scores count as wrong."""
    return (chosen > rejected).astype(jnp.float32).mean()


def dpo_loss(
    chosen: Float[Array, "pairs"],
    rejected: Float[Array, "pairs"],
    reference_chosen: Float[Array, "pairs"],
    reference_rejected: Float[Array, "pairs"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    r"""Compute the loss of direct preference optimization: a policy learns from pairs without a reward model.

    With $z = \beta\,[(\log \pi_c - \log \pi^{ref}_c) - (\log \pi_r - \log \pi^{ref}_r)]$ the loss is the mean of
    $-(1 - \epsilon) \log \sigma(z) - \epsilon \log \sigma(-z)$.

    Args:
        chosen: Log-probabilities of the preferred responses under the policy: sums over their tokens.
        rejected: The same for the other responses.
        reference_chosen: The same for the preferred responses under the reference model.
        reference_rejected: The same for the other responses under the reference model.
        beta: Strength of the penalty for moving away from the reference model.
        label_smoothing: The assumed share of pairs with swapped labels, $\epsilon$.

    Returns:
        The loss, and metrics: ``accuracy``, the share of pairs with z above 0; ``margin``, the mean of z.

    References:
        Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (2023),
            equation 7. https://arxiv.org/abs/2305.18290

    Example:
        >>> import jax.numpy as jnp
        >>> zero = jnp.zeros(2)
        >>> loss, metrics = dpo_loss(zero, zero, zero, zero)
        >>> print(f"{loss:.4f}")
        0.6931
    """
    beta = checked("beta", beta, PositiveFloat)
    smoothing = Annotated[float, Bounds(at_least=0, below=0.5)]
    label_smoothing = checked("label_smoothing", label_smoothing, smoothing)
    z = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    right, wrong = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    loss = -((1.0 - label_smoothing) * right + label_smoothing * wrong).mean()
    fixed = jax.lax.stop_gradient(z)
    return loss, {"accuracy": (fixed > 0).astype(jnp.float32).mean(), "margin": fixed.mean()}
