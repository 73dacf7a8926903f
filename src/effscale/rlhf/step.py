"""One iteration of PPO, GRPO or RLOO: generate responses, score them, learn from them."""

import dataclasses
import time
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from effscale.generation import SamplingConfig, decode
from effscale.models import Transformer
from effscale.options import PositiveInt, checked
from effscale.parallel.placement import on_devices
from effscale.rlhf.config import GroupConfig, PPOConfig
from effscale.rlhf.experience import (
    Experience,
    make_experience,
    make_group_experience,
    minibatch_rows,
)
from effscale.rlhf.rewards import adaptive_kl
from effscale.rlhf.rollout import RolloutConfig, rollout_model
from effscale.rlhf.scores import ModelReward, Reward, total_score
from effscale.rlhf.scoring import response_log_probs, response_values
from effscale.training import TrainState

TrainStep = Callable[..., tuple[TrainState, Mapping[str, Any]]]
"""A step from ``effscale.training.make_train_step``, not compiled yet."""


@typing.no_type_check  # JAX makes it of shapes and placeholders, too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyState:
    """The state of a PPO, GRPO or RLOO run; ``effscale.training.fit`` accepts it and checkpoints store it.

    Attributes:
        actor: Training state of the policy.
        critic: Training state of the critic; None for GRPO and RLOO.
        kl_coef: The KL coefficient.
        step: Number of batches of prompts so far.
        key: The random key.
    """

    actor: TrainState
    critic: TrainState | None
    kl_coef: Any
    step: Any
    key: Any


def create_policy_state(
    actor: TrainState,
    critic: TrainState | None = None,
    *,
    key: PRNGKeyArray,
    config: PPOConfig | GroupConfig,
) -> PolicyState:
    """Create the state before the first iteration.

    Args:
        actor: State of the policy from ``effscale.training.create_train_state``.
        critic: State of the critic; None for GRPO and RLOO.
        key: Random key for the responses and the order of learning.
        config: The config of the step; it defines the initial KL coefficient.
    """
    zero = jnp.zeros((), jnp.int32)
    # A step donates the states: they cannot contain the same array twice, or a key that the caller keeps using.
    own = lambda state: dataclasses.replace(state, key=jax.random.clone(state.key))
    actor, critic = own(actor), None if critic is None else own(critic)
    return PolicyState(actor, critic, jnp.float32(config.kl_coef), zero, key)


def make_policy_step(
    actor_step: TrainStep,
    critic_step: TrainStep | None = None,
    *,
    rewards: Reward | Mapping[str, Reward],
    weights: Mapping[str, float] | None = None,
    reference: Transformer,
    rollout: RolloutConfig,
    config: PPOConfig | GroupConfig,
    epochs: int = 1,
    minibatches: int = 1,
    critic_head: str = "value",
) -> Callable[[PolicyState, Mapping[str, Any]], tuple[PolicyState, dict[str, Any]]]:
    """Create a step of reinforcement learning that improves a policy on a batch of prompts.

    It has three phases. **Generate**: the actor, in the layout of ``rollout``, generates a response to each prompt.
    **Score**: rewards, log-probabilities of the reference model and values of the critic become experience.
    **Update**: actor and critic learn from minibatches of it, in a new order each epoch.

    Each phase is compiled once for each shape of prompts. Create the two training steps with
    ``effscale.training.make_train_step`` from ``effscale.rlhf.actor_loss`` and ``effscale.rlhf.critic_loss``, with
    the optimizer, gradient clipping, moving average and trainable part (such as LoRA) that you want. Pass the step to
    ``effscale.training.fit``, or call it in your own loop; the state that it receives is donated and cannot be used
    again.

    Args:
        actor_step: Training step of the actor.
        critic_step: Training step of the critic; None for a ``GroupConfig``.
        rewards: One reward, or several by name; see ``effscale.rlhf.scores``.
        weights: Weights of several rewards by name; the default is 1.
        reference: The policy before training, which the actor should stay close to. It can be in host memory, see
            ``effscale.parallel.to_host_memory``.
        rollout: Options of generation.
        config: A ``PPOConfig``, or a ``GroupConfig`` for GRPO and RLOO.
        epochs: Number of passes over each batch of responses.
        minibatches: Number of updates per epoch.
        critic_head: Name of the critic's head.

    Returns:
        ``step(state, batch) -> (state, metrics)``. The batch contains ``input_ids`` and ``attention_mask`` of shape
        ``(prompts, length)``, padded on the left; ``text`` if the config mixes in pretraining; and any fields that
        the rewards read. Metrics: those of ``effscale.rlhf.make_experience``; the means over updates as ``actor_...``
        and ``critic_...``; ``kl_coef``; ``skipped_in_row``; and the seconds of each phase, where ``switch_seconds``
        is the change of layout.

    Raises:
        ValueError: Critic and config do not match. In a step: a reward is not finite, the responses cannot be split
            into ``minibatches``, or a frozen model shares arrays with a trained one.
    """
    grouped = isinstance(config, GroupConfig)
    if grouped == (critic_step is not None):
        raise ValueError(
            f"critic_step must be set for a PPOConfig and None for a GroupConfig, got config={type(config).__name__} and critic_step={'a step' if critic_step else None}"
        )
    epochs = checked("epochs", epochs, PositiveInt)
    minibatches = checked("minibatches", minibatches, PositiveInt)
    # Several responses to a prompt share one prefill.
    copies = config.group_size if isinstance(config, GroupConfig) else None
    sampling = rollout.sampling
    if copies is not None:
        sampling = dataclasses.replace(sampling, num_return_sequences=copies)
    temperature = 1.0 if sampling.greedy else sampling.temperature

    judge = _judge(sampling, temperature, critic_head)
    experience_of = _experience_of(config, typing.cast(tuple[int, ...], sampling.stop_token_ids))
    update = _update(actor_step, critic_step, epochs, minibatches)

    def policy_step(
        state: PolicyState, batch: Mapping[str, Any]
    ) -> tuple[PolicyState, dict[str, Any]]:
        _check_prompts(batch, sampling.num_return_sequences, minibatches)
        drawing, order = jax.random.split(jax.random.fold_in(state.key, state.step))
        _check_apart(state, {"the reference": reference, **_reward_models(rewards)})
        clock = _Clock()
        model = jax.block_until_ready(rollout_model(state.actor.model, rollout))
        clock.took("switch")
        prompts, mask = jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"])
        drawn = decode(model, prompts, sampling, attention_mask=mask, key=drawing, log_probs=True)
        jax.block_until_ready(drawn)
        del model  # frees the memory for training
        clock.took("generate")
        critic = None if state.critic is None else state.critic.model
        log_probs, values = judge(on_devices(reference), critic, drawn)
        each = _repeated(batch, sampling.num_return_sequences)
        scores, more = total_score(rewards, drawn, each, weights)
        experience, metrics = experience_of(drawn, log_probs, values, scores, state.kl_coef)
        if "text" in batch:
            experience = _with_text(experience, batch["text"])
        jax.block_until_ready(experience)
        clock.took("score")
        states, of_update = update(state, experience, order)
        clock.took("update")
        kl_coef = state.kl_coef
        if isinstance(config, PPOConfig) and config.kl_target is not None:
            kl_coef = adaptive_kl(
                *(kl_coef, metrics["kl"]),
                target=config.kl_target,
                horizon=config.kl_horizon,
                responses=drawn.tokens.shape[0],
            )
        metrics = {**metrics, **more, **of_update, "kl_coef": state.kl_coef, **clock.seconds}
        new = PolicyState(states["actor"], states.get("critic"), kl_coef, state.step + 1, state.key)
        return new, metrics

    return policy_step


def _judge(
    sampling: SamplingConfig, temperature: float, critic_head: str
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Compile the evaluation of reference model and critic on generated responses."""

    @jax.jit
    def judge(reference: Any, critic: Any, drawn: Any) -> tuple[Any, Any]:
        given = (drawn.tokens, drawn.mask, sampling.max_new_tokens)
        log_probs = response_log_probs(reference, *given, temperature=temperature).log_probs
        if critic is None:
            return log_probs, None
        return log_probs, response_values(critic, *given, head=critic_head)

    return judge


def _experience_of(
    config: PPOConfig | GroupConfig, stop_token_ids: tuple[int, ...]
) -> Callable[..., tuple[Experience, dict[str, Any]]]:
    """Compile the advantages of scored responses."""

    @jax.jit
    def experience_of(
        drawn: Any, log_probs: Any, values: Any, scores: Any, kl_coef: Any
    ) -> tuple[Experience, dict[str, Any]]:
        if isinstance(config, GroupConfig):
            return make_group_experience(
                *(drawn, log_probs, scores), stop_token_ids=stop_token_ids, config=config
            )
        given = (drawn, log_probs, values, scores)
        return make_experience(
            *given, stop_token_ids=stop_token_ids, config=config, kl_coef=kl_coef
        )

    return experience_of


def _update(
    actor_step: TrainStep, critic_step: TrainStep | None, epochs: int, minibatches: int
) -> Callable[..., tuple[dict[str, TrainState], dict[str, Any]]]:
    """Compile all updates from one batch of experience; the states are donated.

    Actor and critic each have a compiled program, and these run one after the other: neither needs the result of the
    other, and only one of them is in memory. In one program, or in two at the same time, their all-reduces between
    CPU devices can deadlock.
    """
    steps = {"actor": actor_step} | ({} if critic_step is None else {"critic": critic_step})
    learn = {name: _learn(step, epochs, minibatches) for name, step in steps.items()}

    def update(state: PolicyState, experience: Experience, key: Any) -> tuple[Any, dict[str, Any]]:
        states, metrics, skipped = {}, {}, []
        for name, program in learn.items():
            found = jax.block_until_ready(program(getattr(state, name), experience, key))
            states[name], of_model = found
            skipped.append(of_model.pop("skipped_in_row"))
            metrics |= {f"{name}_{metric}": value for metric, value in of_model.items()}
        return states, metrics | {"skipped_in_row": jnp.stack(skipped).max()}

    return update


def _learn(
    step: TrainStep, epochs: int, minibatches: int
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Compile the updates of one model."""

    def learn(state: TrainState, experience: Experience, key: Any) -> tuple[Any, dict[str, Any]]:
        rows = experience.tokens.shape[0]
        orders = [
            minibatch_rows(rows, minibatches, jax.random.fold_in(key, epoch))
            for epoch in range(epochs)
        ]
        each = lambda state, index: step(state, experience.rows(index))
        state, found = jax.lax.scan(each, state, jnp.concatenate(orders))
        left_out = ("weight", "tokens", "skipped", "skipped_in_row")
        means = {name: found[name].mean(0) for name in found if name not in left_out}
        return state, means | {"skipped_in_row": found["skipped_in_row"][-1]}

    return jax.jit(learn, donate_argnums=0)


def _repeated(batch: Mapping[str, Any], times: int) -> Mapping[str, Any]:
    """Repeat the fields that rewards read along with the prompts, once for each response."""
    if times == 1:
        return batch

    def again(rows: Any) -> Any:
        if hasattr(rows, "ndim"):
            return rows.repeat(times, axis=0)  # of NumPy or, over several processes, of JAX
        return [row for row in rows for _ in range(times)]

    return {name: rows if name == "text" else again(rows) for name, rows in batch.items()}


def _with_text(experience: Experience, text: Mapping[str, Any]) -> Experience:
    """Return the experience with a row of text for each response."""
    responses = experience.tokens.shape[0]
    for name, rows in text.items():
        if len(rows) != responses:
            raise ValueError(
                f"text[{name!r}] must have one row per response, {responses}, got {len(rows)}"
            )
    return dataclasses.replace(experience, text=text)


def _reward_models(rewards: Reward | Mapping[str, Reward]) -> dict[str, Any]:
    named = rewards if isinstance(rewards, Mapping) else {"model": rewards}
    return {
        f"the reward {name!r}": reward.model
        for name, reward in named.items()
        if isinstance(reward, ModelReward)
    }


def _check_prompts(batch: Mapping[str, Any], responses: int, minibatches: int) -> None:
    """Raise an error before anything is generated if a step cannot use these prompts."""
    if missing := {"input_ids", "attention_mask"} - batch.keys():
        raise ValueError(f"the batch of prompts needs {', '.join(sorted(missing))}")
    rows, mask = batch["input_ids"].shape[0] * responses, batch["attention_mask"]
    if rows % minibatches:
        raise ValueError(
            f"minibatches must divide the number of responses, {rows}, got {minibatches}"
        )
    if getattr(mask, "is_fully_addressable", True) and not np.asarray(mask)[:, -1].all():
        raise ValueError("attention_mask must be true in the last column. Pad prompts on the left.")


def _check_apart(state: PolicyState, read: Mapping[str, Any]) -> None:
    """Raise if a frozen model would be deleted with the state that an update donates."""
    trained = {"actor": state.actor, "critic": state.critic}
    owner = {id(x): name for name, part in trained.items() for x in jax.tree.leaves(part)}
    for name, model in read.items():
        for leaf in jax.tree.leaves(model):
            if id(leaf) in owner:
                raise ValueError(
                    f"{name} shares arrays with the {owner[id(leaf)]}, which training donates. Copy one of them with jax.tree.map(jnp.copy, model)"
                )


class _Clock:
    """Measures the seconds of each phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def took(self, phase: str) -> None:
        """Record the end of a phase."""
        now = time.perf_counter()
        self.seconds[f"{phase}_seconds"] = now - self._last
        self._last = now
