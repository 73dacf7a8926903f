"""What each token of a response earns: the score at its end, less a price for leaving the reference.

All arrays here are of the response alone: place t is the choice of its t-th token, made after the prompt and the tokens before. ``mask`` is true at the
response's own tokens, its end-of-text token among them.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    log_probs: Float[Array, "batch response"],
    reference: Float[Array, "batch response"],
    estimator: KLEstimator = "k1",
) -> Float[Array, "batch response"]:
    r"""An estimate of the divergence from the reference, from the tokens that were drawn.

    With $d = \log \pi - \log \pi_{ref}$ of a token, ``k1`` is $d$, without bias and of either sign; ``k2`` is $d^2 / 2$, small
    in variance; ``k3`` is $e^{-d} - 1 + d$, without bias and never below 0.

    Args:
        log_probs: Log-probabilities of the tokens under the policy that drew them.
        reference: Those under the reference.
        estimator: Which one.

    References:
        Schulman, "Approximating KL Divergence", 2020.

    Example:
        >>> import jax.numpy as jnp
        >>> kl_estimate(jnp.array([[-1.0]]), jnp.array([[-1.5]]), "k2").tolist()
        [[0.125]]
    """
    d = log_probs - reference
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * jnp.square(d)
    if estimator == "k3":
        return jnp.exp(-d) - 1.0 + d
    raise ValueError(f"estimator={estimator!r}: must be 'k1', 'k2' or 'k3'")


def with_next(mask: Bool[Array, "batch response"]) -> Bool[Array, "batch response"]:
    """The mask and one place more, where there is one.

    TRL lets the score stand in the place after a response's last token, and so has values there, too; and DeepSpeed-Chat, whose mask leaves out the token that ends a
    response, at that token.
    """
    before = jnp.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    return mask | before


def shaped_rewards(
    scores: Float[Array, "batch"],
    kl: Float[Array, "batch response"],
    mask: Bool[Array, "batch response"],
    *,
    kl_coef: float | Float[Array, ""] = 0.05,
    clip: float | None = None,
) -> Float[Array, "batch response"]:
    r"""The reward of each token: $r_t = -\beta\, \mathrm{KL}_t$, and the score of the response at its last token as well.

    Args:
        scores: One for each response, of a reward model or a function.
        kl: Of each token, see :func:`kl_estimate`.
        mask: The response's tokens, without gaps from the first one on. With :func:`with_next` the score stands one place later. The score of
            an empty response is lost: leave such responses out.
        kl_coef: The price of divergence, $\beta$. DeepSpeed-Chat takes 0.1, TRL 0.05.
        clip: Scores are clipped to plus and minus this; None: not at all. DeepSpeed-Chat takes 5.

    References:
        Stiennon et al., "Learning to summarize from human feedback", 2020, section 3.4; Yao et al., "DeepSpeed-Chat", 2023.

    Example:
        >>> import jax.numpy as jnp
        >>> mask = jnp.array([[True, True, False]])
        >>> shaped_rewards(jnp.array([7.0]), jnp.array([[1.0, 0.0, 9.0]]), mask, kl_coef=0.5, clip=5.0).tolist()
        [[-0.5, 5.0, 0.0]]
    """
    if clip is not None:
        scores = jnp.clip(scores, -clip, clip)
    # The last true place: true, and false in the place after.
    last = mask & ~jnp.pad(mask, ((0, 0), (0, 1)))[:, 1:]
    return jnp.where(mask, -kl_coef * kl, 0.0) + jnp.where(last, scores[:, None], 0.0)


def adaptive_kl(
    kl_coef: Float[Array, ""],
    kl: Float[Array, ""],
    *,
    target: float = 6.0,
    horizon: float = 10_000.0,
    responses: int,
) -> Float[Array, ""]:
    r"""The price of divergence for the next batch: higher where the policy went too far, lower where it stays too close.

    $$\beta \leftarrow \beta\, (1 + \mathrm{clip}(\mathrm{KL} / \mathrm{target} - 1, \pm 0.2)\; n / \mathrm{horizon})$$

    Args:
        kl_coef: The price so far.
        kl: Mean divergence of a response, in nats: the sum over its tokens.
        target: The divergence that is wanted.
        horizon: Responses after which the price has changed by about a fifth at most.
        responses: Responses in this batch, n.

    References:
        Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019, section 2.2.

    Example:
        >>> import jax.numpy as jnp
        >>> print(adaptive_kl(jnp.float32(0.1), jnp.float32(12.0), responses=1000))
        0.102
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * (responses / horizon))
