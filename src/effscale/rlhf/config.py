"""Options of policy learning: PPO, GRPO and RLOO."""

import dataclasses
from typing import Annotated, Literal

from effscale.options import Bounds, Fraction, NonNegativeFloat, Options, PositiveFloat
from effscale.rlhf.policy_loss import PolicyLossConfig
from effscale.rlhf.rewards import KLEstimator


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningConfig(Options):
    """Options that ``PPOConfig`` and ``GroupConfig`` have in common."""

    kl_coef: NonNegativeFloat = 0.05
    """Coefficient of the KL divergence from the reference model, per nat."""
    kl_estimator: KLEstimator = "k1"
    """Estimator of the KL divergence; see ``effscale.rlhf.kl_estimate``."""
    score_clip: PositiveFloat | None = None
    """Clip scores to plus and minus this value; None disables clipping."""
    missing_end_penalty: NonNegativeFloat = 0.0
    """Penalty subtracted from the score of a response that was cut off before it ended."""
    learn_end: bool = True
    """Whether to train on the token that ends a response. DeepSpeed-Chat does not, because it cannot distinguish it from padding."""
    policy: PolicyLossConfig = PolicyLossConfig()
    """Clipping and averaging of the policy loss."""
    entropy_coef: NonNegativeFloat = 0.0
    """Coefficient of the entropy bonus in the policy loss, per nat."""
    pretraining_coef: NonNegativeFloat = 0.0
    """Weight of the next-token loss on ordinary text that is mixed in ("PTX"); InstructGPT and DeepSpeed-Chat use 27.8."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(LearningConfig):
    """Options of PPO.

    The defaults are common practice today; for DeepSpeed-Chat's, use ``DEEPSPEED_CHAT``. TRL 1.12 uses
    ``score_at="next"``, and trains both models with one optimizer on the policy loss plus 0.1 times the critic loss.
    """

    kl_target: PositiveFloat | None = None
    """Target divergence of a response, in nats, for ``effscale.rlhf.adaptive_kl``, which adjusts ``kl_coef``; None keeps ``kl_coef`` constant."""
    kl_horizon: PositiveFloat = 10_000.0
    """Number of responses over which ``kl_coef`` then changes by at most about a fifth."""
    score_at: Literal["last", "next"] = "last"
    """Where the score is applied: at the last token of a response, or at the position after it, as in TRL."""
    gamma: Fraction = 1.0
    """Discount factor."""
    lam: Fraction = 0.95
    """Lambda of generalized advantage estimation."""
    whiten_rewards: bool = False
    """Normalize the rewards of a batch to variance 1."""
    whiten_advantages: bool = True
    """Normalize the advantages of a batch to mean 0 and variance 1."""
    value_clip: PositiveFloat | None = 0.2
    """How far a value can move in one batch of responses; None means no bound."""


DEEPSPEED_CHAT = PPOConfig(kl_coef=0.1, score_clip=5.0, whiten_advantages=False, learn_end=False)
"""DeepSpeed-Chat's settings: its constants, no whitening, and the token that ends a response gets the score but is not trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig(LearningConfig):
    """Options of learning from several responses per prompt without a critic: GRPO by default.

    For RLOO, use ``advantage="leave_one_out", kl_in="reward", kl_estimator="k1"``. For Dr. GRPO, use ``scale=False``
    with ``policy=PolicyLossConfig(average="fixed")``.

    References:
        Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models" (2024), for
            GRPO. https://arxiv.org/abs/2402.03300
        Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
            LLMs" (2024), for RLOO. https://arxiv.org/abs/2402.14740
        Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective" (2025), for Dr. GRPO.
            https://arxiv.org/abs/2503.20783
    """

    kl_estimator: KLEstimator = "k3"
    group_size: Annotated[int, Bounds(at_least=2)] = 8
    """Number of responses per prompt."""
    advantage: Literal["group", "leave_one_out"] = "group"
    """The baseline of a score: the mean of its group (``effscale.rlhf.group_advantages``), or the mean of the others in the group (``effscale.rlhf.leave_one_out_advantages``)."""
    scale: bool = True
    """Whether ``group`` divides by the standard deviation of the group."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the divergence is penalized: in the loss of each token, or in the score of a response."""
