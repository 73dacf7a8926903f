"""Reinforcement learning from human feedback, as DeepSpeed-Chat does it, and as the field does it since: the losses and estimates, functions of arrays."""

from effscale.rlhf.advantages import gae, group_advantages, leave_one_out_advantages, whiten
from effscale.rlhf.experience import (
    Experience,
    PPOConfig,
    actor_loss,
    critic_loss,
    make_experience,
)
from effscale.rlhf.policy_loss import PolicyLossConfig, masked_average, policy_loss, value_loss
from effscale.rlhf.preferences import (
    diverging,
    dpo_loss,
    pairwise_accuracy,
    pairwise_loss,
    token_pairwise_loss,
)
from effscale.rlhf.rewards import adaptive_kl, kl_estimate, shaped_rewards, with_next
from effscale.rlhf.scoring import (
    ResponseLogProbs,
    response_log_probs,
    response_scores,
    response_values,
)

__all__ = [
    "Experience",
    "PPOConfig",
    "PolicyLossConfig",
    "ResponseLogProbs",
    "actor_loss",
    "adaptive_kl",
    "critic_loss",
    "diverging",
    "dpo_loss",
    "gae",
    "group_advantages",
    "kl_estimate",
    "leave_one_out_advantages",
    "make_experience",
    "masked_average",
    "pairwise_accuracy",
    "pairwise_loss",
    "policy_loss",
    "response_log_probs",
    "response_scores",
    "response_values",
    "shaped_rewards",
    "token_pairwise_loss",
    "value_loss",
    "whiten",
    "with_next",
]
