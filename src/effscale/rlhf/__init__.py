"""Reinforcement learning from human feedback: DeepSpeed-Chat's PPO, and the newer GRPO, RLOO and DPO."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.rlhf.advantages import gae, group_advantages, leave_one_out_advantages, whiten
    from effscale.rlhf.config import DEEPSPEED_CHAT, GroupConfig, PPOConfig
    from effscale.rlhf.experience import make_experience, make_group_experience
    from effscale.rlhf.losses import actor_loss, critic_loss
    from effscale.rlhf.pairs import preference_loss, reward_model_loss
    from effscale.rlhf.policy_loss import policy_loss, value_loss
    from effscale.rlhf.preferences import dpo_loss, pairwise_loss, token_pairwise_loss
    from effscale.rlhf.rewards import adaptive_kl, kl_estimate, shaped_rewards
    from effscale.rlhf.rollout import RolloutConfig
    from effscale.rlhf.scores import ModelReward, from_text
    from effscale.rlhf.scoring import response_log_probs, response_scores, response_values
    from effscale.rlhf.step import create_policy_state, make_policy_step

__all__ = [
    "DEEPSPEED_CHAT",
    "GroupConfig",
    "ModelReward",
    "PPOConfig",
    "RolloutConfig",
    "actor_loss",
    "adaptive_kl",
    "create_policy_state",
    "critic_loss",
    "dpo_loss",
    "from_text",
    "gae",
    "group_advantages",
    "kl_estimate",
    "leave_one_out_advantages",
    "make_experience",
    "make_group_experience",
    "make_policy_step",
    "pairwise_loss",
    "policy_loss",
    "preference_loss",
    "response_log_probs",
    "response_scores",
    "response_values",
    "reward_model_loss",
    "shaped_rewards",
    "token_pairwise_loss",
    "value_loss",
    "whiten",
]

lazy_package(__name__)
