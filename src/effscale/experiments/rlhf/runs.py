"""The steps of the experiment ``rlhf``: each trains a model and saves it as a model folder."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from effscale.experiments.rlhf import data
from effscale.experiments.rlhf.config import Config, LearningConfig, Step
from effscale.experiments.shared.runs import once, train_to_end
from effscale.generation import SamplingConfig
from effscale.interop import load_pretrained, save_pretrained
from effscale.models import (
    ClassHead,
    Transformer,
    add_lora,
    is_adapter,
    merge_lora,
    replace_heads,
    with_config,
)
from effscale.parallel import shard, shard_batch, shardings, to_host_memory
from effscale.rlhf import (
    GroupConfig,
    ModelReward,
    PPOConfig,
    RolloutConfig,
    actor_loss,
    create_policy_state,
    critic_loss,
    make_policy_step,
    preference_loss,
    reward_model_loss,
)
from effscale.rlhf.data import RecordEncoder
from effscale.training import (
    AdamWConfig,
    Clip,
    RunFolder,
    ScheduleConfig,
    create_train_state,
    evaluate,
    make_eval_step,
    make_train_step,
    next_token_loss,
)
from effscale.training.state import ema_model
from effscale.training.step import count_tokens

SCORE = ClassHead(num_classes=1, name="score", pool="last", bias=False)
"""The head of a reward model."""
VALUE = ClassHead(num_classes=1, name="score", pool="none", bias=False)
"""The head with a value after each token: for a critic, which is initialized from the reward model, and for a reward model that learns from
each token."""


class Steps:
    """All steps of one seed.

    Args:
        config: Config of the experiment.
        folder: The run folder.
        mesh: The device mesh.
        seed: The random seed.
        phases: Records of each step.
        encoder: The actor's tokenizer and chat format.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        mesh: jax.sharding.Mesh,
        seed: int,
        phases: data.Phases,
        encoder: RecordEncoder,
    ):
        self.config, self.folder, self.mesh, self.seed = config, folder, mesh, seed
        self.phases, self.encoder = phases, encoder

    def run(self, step: Step) -> None:
        """Run a step, resume one that was stopped, or skip a finished one.

        Raises:
            FileNotFoundError: An earlier step that it needs has not been run.
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """
        names = {"reward": self._reward, "base": self._base, "sft": self._sft, "dpo": self._dpo}
        train = names.get(step, functools.partial(self._policy, step))

        def whole() -> None:
            self._save(step, train())

        once(self.folder, self._name(step), whole)

    def _save(self, step: Step, model: Transformer, name: str = "model") -> None:
        # An actor's folder has more than a tokenizer to copy: a chat template and generation settings.
        actor = data.actor_source(self.config)
        tokenizer = self.encoder.tokenizer if actor is None else None
        folder = self.folder.path / self._name(step) / name
        save_pretrained(merge_lora(model), folder, like=actor, tokenizer=tokenizer)

    def place(self, step: Step) -> pathlib.Path:
        """Return the folder of the model that a step saved."""
        return self.folder.path / self._name(step) / "model"

    def actor(self) -> Transformer:
        """Load the fine-tuned model, which is the initial policy and the reference model."""
        for step in ("sft", "base"):
            if (self.place(step) / "config.json").is_file():
                return self._load(self.place(step))
        given = data.actor_source(self.config)
        if given is not None:
            return self._load(given)
        raise FileNotFoundError(f"{self.place('sft')}: does not exist. Run the step sft first")

    def policy(self, step: Step) -> Transformer:
        """Load the policy after a step."""
        return self._load(self.place(step))

    def reward_model(self, head: ClassHead = SCORE) -> Transformer:
        """Load the reward model of --reward or of the step reward; with the head ``VALUE``, the critic."""
        place = self.place("reward") if self.config.reward is None else self.config.reward
        if not (place / "config.json").is_file():
            raise FileNotFoundError(f"{place}: has no model. Run the step reward first")
        return self._load(place, (head,))

    def rollout(self) -> RolloutConfig:
        """Return the options of generation, for training and evaluation."""
        sampling = SamplingConfig(
            max_new_tokens=self.config.response_length,
            min_new_tokens=self.config.min_response_length,
            temperature=self.config.temperature,
            stop_token_ids=self.encoder.stop_token_ids,
            pad_token_id=self.encoder.padding,
        )
        prepare = _in_bfloat16 if self.config.dtype == "bfloat16" else None
        return RolloutConfig(sampling=sampling, prepare=prepare, mesh=self.mesh)

    def held_out_pairs(self) -> dict[str, np.ndarray]:
        """Return the held-out pairs."""
        return data.pairs_of(self.config, self.encoder, self.phases.held_out)

    def held_out_prompts(self) -> dict[str, np.ndarray]:
        """Return the prompts of held-out records."""
        rows = data.prompts_of(self.config, self.encoder, self.phases.held_out)
        return {name: array[: self.config.eval_prompts] for name, array in rows.items()}

    def _name(self, step: Step) -> str:
        return f"seed-{self.seed}/{step}"

    def _load(self, place: pathlib.Path, heads: tuple[ClassHead, ...] | None = None) -> Transformer:
        """Load a model on the mesh, in float32, with the config's compute dtype."""
        model = load_pretrained(place, dtype="float32", mesh=self.mesh, heads=heads)
        return self._computing(model)

    def _computing(self, model: Transformer) -> Transformer:
        dtype, remat = self.config.dtype, self.config.remat
        return with_config(model, dataclasses.replace(model.config, dtype=dtype, remat=remat))

    def _read_only(self, model: Transformer) -> Transformer:
        """Return a frozen model, stored in its compute dtype."""
        return _in_bfloat16(model) if self.config.dtype == "bfloat16" else model

    def _trained(
        self,
        step: Step,
        loss: Callable[..., Any],
        rows: Mapping[str, np.ndarray],
        create: Callable[[], Transformer],
        held_out: Callable[[Any], Mapping[str, float]],
        frozen: Any = None,
    ) -> Transformer:
        """Return a model after supervised training on rows."""
        learning = self.config.learning(step)
        optimizer, rate = _optimizer(learning)
        trainable = is_adapter if self._has_lora(step) else None
        train = make_train_step(
            *(loss, optimizer),
            clip=Clip(1.0),
            tokens_per_batch=_count_tokens,
            learning_rate=rate,
            trainable=trainable,
        )

        def start() -> Any:
            key = jax.random.key(self.seed)
            model = create()
            if self._has_lora(step):
                model = add_lora(model, rank=self.config.lora_rank, key=key)
            return create_train_state(model, optimizer, key=key, trainable=trainable)

        batches = data.Rows(rows, learning.batch_size, self.seed)
        state = self._train(
            *(step, jax.jit(train, donate_argnums=0), batches, start),
            evaluate=held_out,
            every=max(1, learning.steps // 4),
            frozen=frozen,
        )
        return state.model

    def _train(
        self,
        step: Step,
        train: Callable[..., Any],
        batches: data.Rows,
        create: Callable[[], Any],
        **options: Any,
    ) -> Any:
        """Return the state after a step's training on the mesh."""
        learning = self.config.learning(step)
        return train_to_end(
            *(self.folder, self._name(step), train, batches),
            create=lambda: shard(create(), self.mesh),
            trace_create=False,  # weights from a file are not part of a program
            num_steps=learning.steps,
            place_batch=lambda batch: shard_batch(batch, self.mesh),
            **options,
        )

    def _has_lora(self, step: Step) -> bool:
        return self.config.lora_rank > 0 and step in ("sft", "dpo", "ppo", "grpo", "rloo")

    def _base(self) -> Transformer:
        config, tokenizer = self.config, self.encoder.tokenizer
        size = config.model.build(tokenizer.get_vocab_size(), config.max_length)
        rows = self._text(config.base.steps * config.base.batch_size)
        make = lambda: self._computing(Transformer(size, rngs=nnx.Rngs(self.seed)))
        placed = jax.jit(make, out_shardings=shardings(jax.eval_shape(make), self.mesh))
        return self._trained("base", next_token_loss, rows, placed, lambda state: {})

    def _sft(self) -> Transformer:
        base = self.place("base")
        place = base if (base / "config.json").is_file() else data.actor_source(self.config)
        if place is None:
            raise FileNotFoundError(
                f"{base}: does not exist. Run the step base first, or set --actor"
            )
        rows = data.sft_rows(self.config, self.encoder, self.phases.sft)
        held_out = data.sft_rows(self.config, self.encoder, self.phases.held_out)
        test = functools.partial(_evaluated, next_token_loss, held_out, self.config.sft.batch_size)
        return self._trained("sft", next_token_loss, rows, lambda: self._load(place), test)

    def _reward(self) -> Transformer:
        key = jax.random.key(self.seed)
        rows = data.pairs_of(self.config, self.encoder, self.phases.reward)
        batch = self.config.reward_model.batch_size
        form, lm_coef = self.config.reward_form, self.config.reward_lm_coef
        loss = functools.partial(reward_model_loss, form=form, lm_coef=lm_coef)
        score = VALUE if form == "token" else SCORE

        def begin() -> Transformer:
            actor = self.actor()
            kept = actor.config.heads if lm_coef else ()
            return replace_heads(actor, (*kept, score), key=key)

        test = functools.partial(_evaluated, loss, self.held_out_pairs(), batch)
        model = self._trained("reward", loss, rows, begin, test)
        # From now on only scores are needed, and transformers reads the score only at the last token.
        return replace_heads(model, (SCORE,), key=key)

    def _dpo(self) -> Transformer:
        reference = self._read_only(self.actor())
        loss = functools.partial(preference_loss, beta=self.config.beta)
        rows = data.pairs_of(self.config, self.encoder, self.phases.prompts)
        batch = self.config.policy.batch_size
        test = functools.partial(_evaluated, loss, self.held_out_pairs(), batch, frozen=reference)
        return self._trained("dpo", loss, rows, self.actor, test, frozen=reference)

    def _policy(self, step: Step) -> Transformer:
        config, learning = self.config, self.config.policy
        how = config.learned_by(step)
        updates = learning.steps * config.epochs * config.minibatches
        optimizer, rate = _optimizer(dataclasses.replace(learning, steps=updates))
        trainable = is_adapter if config.lora_rank else None
        loss = functools.partial(actor_loss, config=how, temperature=config.temperature)
        train = make_train_step(
            *(loss, optimizer),
            clip=Clip(1.0),
            learning_rate=rate,
            trainable=trainable,
            ema_decay=config.ema_decay,
        )
        critic_step = critic_optimizer = None
        if isinstance(how, PPOConfig):
            critic = LearningConfig(steps=updates, learning_rate=config.critic_rate)
            critic_optimizer, _ = _optimizer(critic)
            value = functools.partial(critic_loss, config=how, head="score")
            critic_step = make_train_step(value, critic_optimizer, clip=Clip(1.0))
        waits = to_host_memory if config.offload else lambda model: model
        policy_step = make_policy_step(
            *(train, critic_step),
            rewards=ModelReward(waits(self._read_only(self.reward_model()))),
            reference=waits(self._read_only(self.actor())),
            rollout=self.rollout(),
            config=how,
            epochs=config.epochs,
            minibatches=config.minibatches,
            critic_head="score",
        )

        def start() -> Any:
            key = jax.random.key(self.seed)
            model = self.actor()
            if config.lora_rank:
                model = add_lora(model, rank=config.lora_rank, key=key)
            averaged = config.ema_decay is not None
            states = [
                create_train_state(model, optimizer, key=key, trainable=trainable, ema=averaged)
            ]
            if critic_optimizer is not None:
                states.append(
                    create_train_state(self.reward_model(VALUE), critic_optimizer, key=key)
                )
            return create_policy_state(*states, key=jax.random.fold_in(key, 1), config=how)

        prompts = data.prompts_of(config, self.encoder, self.phases.prompts)
        batches = data.Rows(prompts, learning.batch_size, self.seed)
        if how.pretraining_coef:
            responses = learning.batch_size
            responses *= how.group_size if isinstance(how, GroupConfig) else 1
            text = self._text(learning.steps * responses)
            given = (prompts, learning.batch_size, self.seed)
            batches = data.PromptsAndText(*given, text=text, text_rows=responses)
        evaluate = lambda state: {}
        state = self._train(
            *(step, policy_step, batches, start), evaluate=evaluate, every=config.eval_every
        )
        if config.ema_decay is not None:
            self._save(step, ema_model(state.actor), "model-ema")
        return state.actor.model

    def _text(self, rows: int) -> dict[str, np.ndarray]:
        """Return rows of the source of the standard library."""
        end_id = self.encoder.stop_token_ids[0]
        given = (self.config, self.encoder.tokenizer, self.phases.held_out, end_id)
        return data.text_rows(*given, rows)


def _optimizer(
    learning: LearningConfig,
) -> tuple[optax.GradientTransformation, Callable[[Any], Any]]:
    """Return AdamW without weight decay, as is usual for RLHF, and its learning rate."""
    peak = learning.learning_rate
    rate = ScheduleConfig(
        peak=peak, warmup=learning.steps // 10, total=learning.steps, final=peak / 10
    ).build()
    return AdamWConfig(b2=0.95, weight_decay=0.0).build(rate), rate


def _in_bfloat16(model: Transformer) -> Transformer:
    return jax.tree.map(lambda x: x.astype("bfloat16"), model)


def _count_tokens(batch: Mapping[str, Any]) -> int:
    """Return the number of tokens of rows, or of both responses of pairs, including padding."""
    pair = [batch[name].size for name in ("chosen", "rejected") if name in batch]
    return sum(pair) if pair else count_tokens(batch)


@functools.lru_cache(maxsize=8)
def _eval_step(loss: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(make_eval_step(loss))


def _evaluated(
    loss: Callable[..., Any],
    rows: Mapping[str, np.ndarray],
    batch_size: int,
    state: Any,
    frozen: Any = None,
) -> dict[str, float]:
    """Return loss and metrics on held-out rows."""
    count = len(next(iter(rows.values())))
    cuts = [slice(i, i + batch_size) for i in range(0, count, batch_size)]
    batches = [{name: array[cut] for name, array in rows.items()} for cut in cuts]
    return evaluate(state.model, _eval_step(loss), batches, frozen=frozen, prefix="val_")
