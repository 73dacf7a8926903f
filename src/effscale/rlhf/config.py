"""What a policy learns by: the options of PPO, and of GRPO and RLOO."""

import dataclasses
import math
import typing
from typing import Literal

from effscale.models.validation import check, choice, is_integer
from effscale.rlhf.policy_loss import PolicyLossConfig
from effscale.rlhf.rewards import KLEstimator


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """What ``PPOConfig`` and ``GroupConfig`` have in common."""

    kl_coef: float = 0.05
    """The price of divergence from the reference, for each nat."""
    kl_estimator: KLEstimator = "k1"
    """How the divergence is estimated, see ``effscale.rlhf.kl_estimate``."""
    score_clip: float | None = None
    """Scores are clipped to plus and minus this; None: not at all."""
    missing_end_penalty: float = 0.0
    """Taken off the score of a response that was cut off before it ended."""
    learn_end: bool = True
    """Whether the token that ends a response is learned like the others. DeepSpeed-Chat leaves it out, as it cannot tell it from padding."""
    policy: PolicyLossConfig = PolicyLossConfig()
    """Clips and averages of the policy's loss."""
    entropy_coef: float = 0.0
    """Reward for a nat of entropy, in the policy's loss."""
    pretraining_coef: float = 0.0
    """Weight of the next-token loss on ordinary text that is mixed in ("PTX"); InstructGPT and DeepSpeed-Chat take 27.8."""

    def __post_init__(self):
        for name in ("kl_coef", "missing_end_penalty", "entropy_coef", "pretraining_coef"):
            check(self, 0 <= getattr(self, name) < math.inf, name, "0 or more, and finite")
        clip = self.score_clip
        check(
            self, clip is None or 0 < clip < math.inf, "score_clip", "above 0 and finite, or None"
        )
        choice(self, "kl_estimator", typing.get_args(KLEstimator))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(LearningConfig):
    """What PPO makes of responses and scores.

    The defaults are what is usual today; DeepSpeed-Chat's are in ``DEEPSPEED_CHAT``. TRL 1.12 has
    ``score_at="next"``, and trains both models by one optimizer on the policy's loss plus 0.1 times the critic's.
    """

    kl_target: float | None = None
    """Divergence of a response, in nats, at which ``effscale.rlhf.adaptive_kl`` keeps the policy by changing ``kl_coef``; None: ``kl_coef`` stays."""
    kl_horizon: float = 10_000.0
    """Responses in which ``kl_coef`` then changes by about a fifth at most."""
    score_at: Literal["last", "next"] = "last"
    """Where the score stands: at the last token of a response, or in the place after it, as in TRL."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """Of generalized advantage estimation."""
    whiten_rewards: bool = False
    """Give the rewards of a batch a variance of 1."""
    whiten_advantages: bool = True
    """Give the advantages of a batch a mean of 0 and a variance of 1."""
    value_clip: float | None = 0.2
    """How far a value may move in one batch of responses; None: without bound."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("value_clip", "kl_target"):
            value = getattr(self, name)
            check(self, value is None or 0 < value < math.inf, name, "above 0 and finite, or None")
        check(self, 0 < self.kl_horizon < math.inf, "kl_horizon", "above 0 and finite")
        for name in ("gamma", "lam"):
            check(self, 0 <= getattr(self, name) <= 1, name, "from 0 to 1")
        choice(self, "score_at", ("last", "next"))


DEEPSPEED_CHAT = PPOConfig(kl_coef=0.1, score_clip=5.0, whiten_advantages=False, learn_end=False)
"""What DeepSpeed-Chat does: its constants, no whitening, and the token that ends a response gets the score and is not learned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig(LearningConfig):
    """What is made of several responses to each prompt, without a critic: GRPO by default.

    RLOO is ``advantage="leave_one_out", kl_in="reward", kl_estimator="k1"``; Dr. GRPO is ``scale=False`` with ``policy=PolicyLossConfig(average="fixed")``.

    References:
        Shao et al., "DeepSeekMath", 2024 (GRPO); Ahmadian et al., "Back to Basics", 2024 (RLOO); Liu et al., "Understanding R1-Zero-Like Training", 2025 (Dr. GRPO).
    """

    kl_estimator: KLEstimator = "k3"
    group_size: int = 8
    """Responses to each prompt."""
    advantage: Literal["group", "leave_one_out"] = "group"
    """A score less the mean of its group (``effscale.rlhf.group_advantages``), or less that of the others in it (``effscale.rlhf.leave_one_out_advantages``)."""
    scale: bool = True
    """Whether ``group`` divides by the deviation within the group."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where divergence is paid for: in the loss of each token, or in the score of a response."""

    def __post_init__(self):
        super().__post_init__()
        enough = is_integer(self.group_size) and self.group_size >= 2
        check(self, enough, "group_size", "at least 2")
        choice(self, "advantage", ("group", "leave_one_out"))
        choice(self, "kl_in", ("loss", "reward"))
