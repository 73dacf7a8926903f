"""Rewards of the tokens of a response: the score at its end, minus a penalty for divergence from the reference model.

All arrays here cover only the response: position t is the choice of its t-th token, given the prompt and the previous
tokens. ``mask`` is true at the response's tokens, including its end-of-text token.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effscale.options import PositiveFloat, checked

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    log_probs: Float[Array, "batch response"],
    reference: Float[Array, "batch response"],
    estimator: KLEstimator = "k1",
) -> Float[Array, "batch response"]:
    r"""Estimate the divergence from the reference model from the generated tokens.

    With $d = \log \pi - \log \pi_{ref}$ of a token, ``k1`` is $d$, which is unbiased and can be negative; ``k2`` is
    $d^2 / 2$, which has low variance; ``k3`` is $e^{-d} - 1 + d$, which is unbiased and never negative.

    Args:
        log_probs: Log-probabilities of the tokens under the policy that generated them.
        reference: Log-probabilities under the reference model.
        estimator: ``k1``, ``k2`` or ``k3``.

    References:
        Schulman, "Approximating KL Divergence" (2020), blog post. http://joschu.net/blog/kl-approx.html

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
        return bounded_exp(-d) - 1.0 + d
    raise ValueError(f"estimator must be 'k1', 'k2' or 'k3', got {estimator!r}")


def bounded_exp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return ``exp(x)``, bounded by the root of the largest number of the dtype, where its gradient stays that of the bound.

    The exponential itself overflows, and then the gradient is NaN even where clipping or a mask removes the value.
    """
    most = 0.5 * math.log(float(jnp.finfo(x.dtype).max))
    return jnp.exp(x - jax.lax.stop_gradient(jnp.maximum(x - most, 0.0)))


def with_next(mask: Bool[Array, "batch response"]) -> Bool[Array, "batch response"]:
    """Extend the mask by one position, if there is one.

    TRL applies the score at the position after a response's last token, and so has values there too. DeepSpeed-Chat,
    whose mask does not include the token that ends a response, applies it at that token.
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
    r"""Compute the reward of each token: $r_t = -\beta\, \mathrm{KL}_t$, plus the score of the response at its last token.

    Args:
        scores: One score per response, from a reward model or a function.
        kl: Divergence of each token, see ``effscale.rlhf.kl_estimate``.
        mask: True at the response's tokens, from the first one on without gaps. With ``with_next`` the score is
            applied one position later. The score of an empty response is lost, so leave such responses out.
        kl_coef: The KL coefficient, $\beta$. DeepSpeed-Chat uses 0.1, TRL 0.05.
        clip: Clip scores to plus and minus this value; None disables clipping. DeepSpeed-Chat uses 5.

    References:
        Stiennon et al., "Learning to summarize from human feedback" (2020), section 3.4.
            https://arxiv.org/abs/2009.01325
        Yao et al., "DeepSpeed-Chat: Easy, Fast and Affordable RLHF Training of ChatGPT-like Models at All Scales"
            (2023). https://arxiv.org/abs/2308.01320

    Example:
        >>> import jax.numpy as jnp
        >>> mask = jnp.array([[True, True, False]])
        >>> shaped_rewards(jnp.array([7.0]), jnp.array([[1.0, 0.0, 9.0]]), mask, kl_coef=0.5, clip=5.0).tolist()
        [[-0.5, 5.0, 0.0]]
    """
    if clip is not None:
        clip = checked("clip", clip, PositiveFloat)
        scores = jnp.clip(scores, -clip, clip)
    # The last true position: true, and false at the next position.
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
    r"""Return the KL coefficient for the next batch: higher if the policy moved too far, lower if it stayed too close.

    $$\beta \leftarrow \beta\, (1 + \mathrm{clip}(\mathrm{KL} / \mathrm{target} - 1, \pm 0.2)\; n / \mathrm{horizon})$$

    Args:
        kl_coef: The current coefficient.
        kl: Mean divergence per response, in nats: the sum over its tokens.
        target: The target divergence.
        horizon: Number of responses over which the coefficient changes by at most about a fifth.
        responses: Number of responses in this batch, n.

    References:
        Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), section 2.2.
            https://arxiv.org/abs/1909.08593

    Example:
        >>> import jax.numpy as jnp
        >>> print(adaptive_kl(jnp.float32(0.1), jnp.float32(12.0), responses=1000))
        0.102
    """
    target = checked("target", target, PositiveFloat)
    horizon = checked("horizon", horizon, PositiveFloat)
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * (responses / horizon))
