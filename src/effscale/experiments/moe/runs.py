"""The training runs of the experiment ``moe``: one per arm and seed."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from effscale.data import Corpus, make_dataset
from effscale.experiments.moe.arms import ARMS, ArmName
from effscale.experiments.moe.config import Config
from effscale.experiments.shared.runs import once, train_to_end
from effscale.models import Transformer
from effscale.moe import RouterWatch, mixture_of_students_loss, staged_distillation
from effscale.training import (
    Checkpoints,
    Clip,
    RunFolder,
    ScheduleConfig,
    ShapeBuckets,
    StagedStep,
    TrainState,
    create_train_state,
    evaluate,
    make_eval_step,
    make_train_step,
    next_token_loss,
)

_EVAL_STEP = jax.jit(make_eval_step(next_token_loss))


def make_step(
    config: Config, name: ArmName
) -> tuple[Callable[..., tuple[TrainState, Any]], optax.GradientTransformation]:
    """Return the training step of an arm, not jitted, and its optimizer. A student's step gets its teacher as ``frozen``."""
    steps, peak = config.steps_of(name), config.rate_of(name)
    rate = ScheduleConfig(peak=peak, warmup=config.warmup, total=steps, final=peak / 10).build()
    optimizer = config.optimizer.build(rate)
    loss: Any = next_token_loss
    if ARMS[name].teacher is not None:
        options = {"alpha": config.alpha, "temperature": config.temperature}
        loss = functools.partial(mixture_of_students_loss, **options)
    step = make_train_step(
        loss,
        optimizer,
        accumulate=config.accumulate,
        clip=Clip(config.clip_norm),
        learning_rate=rate,
    )
    return step, optimizer


class Training:
    """Training of an arm, compiled once for all seeds.

    Args:
        config: Config of the experiment.
        name: The arm.
        corpora: The prepared corpora.
        weights: Sampling weight of each corpus, or None.
    """

    def __init__(
        self,
        config: Config,
        name: ArmName,
        corpora: tuple[Corpus, ...],
        weights: tuple[float, ...] | None,
    ):
        self.config, self.name, self.arm = config, name, ARMS[name]
        self.corpora, self.weights = corpora, weights
        self.steps = config.steps_of(name)
        self.model = config.transformer(name, corpora[0].vocab_size)
        self._plain, self.optimizer = make_step(config, name)
        self.step: Any = (
            self._staged() if self.arm.leaves else ShapeBuckets(self._plain, donate_argnums=0)
        )

    def name_of(self, seed: int) -> str:
        """Return the name of the run, which is also its folder inside the run folder."""
        return f"seed-{seed}/{self.name}"

    def run(self, folder: RunFolder, seed: int) -> None:
        """Start a run, resume one that was stopped, or skip a finished one.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """
        name = self.name_of(seed)

        def train() -> None:
            state = train_to_end(
                folder,
                name,
                self.step,
                iter(self._rows(seed)),
                create=functools.partial(self._create, seed),
                num_steps=self.steps,
                evaluate=self._evaluate,
                every=self.config.eval_every,
                restage=self._staged if self.arm.leaves else None,
                wrap_writer=RouterWatch,
                frozen=self._teacher(folder, seed),
            )
            with _kept(folder, name) as kept:
                kept.save(self.steps, state.model, force=True)

        once(folder, name, train)

    def _staged(self) -> StagedStep:
        return staged_distillation(self._plain, self.config.teacher_stop(self.name))

    def _teacher(self, folder: RunFolder, seed: int) -> Transformer | None:
        """Load the teacher of this seed, which was trained before."""
        teacher = self.arm.teacher
        if teacher is None:
            return None
        model = self.config.transformer(teacher, self.corpora[0].vocab_size)
        like = jax.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))
        with _kept(folder, f"seed-{seed}/{teacher}") as kept:
            restored = kept.restore(like)
        if restored is None:
            raise FileNotFoundError(f"{kept.folder}: has no model. Train {teacher} first")
        return restored.state

    def _rows(self, seed: int) -> Any:
        stores = [corpus.train for corpus in self.corpora]
        return make_dataset(stores, weights=self.weights, seed=seed, **self._shape())

    def _shape(self) -> dict[str, Any]:
        return {"length": self.config.length, "batch_size": self.config.batch_size}

    def _create(self, seed: int) -> TrainState:
        make = jax.jit(lambda: Transformer(self.model, rngs=nnx.Rngs(seed)))
        return create_train_state(make(), self.optimizer, key=jax.random.key(seed))

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        def loss(batches: int | None) -> float:
            stores = [corpus.validation for corpus in self.corpora]
            rows = make_dataset(
                stores, shuffle=False, num_epochs=1, remainder="pad", **self._shape()
            )
            found = evaluate(state.model, _EVAL_STEP, itertools.islice(rows, batches))
            return found.get("task_loss", found["loss"])  # without the routers' auxiliary losses

        values = {"part_val_loss": loss(self.config.eval_batches)}
        if int(state.step) == self.steps:
            values["val_loss"] = loss(None)
        return values


def _kept(folder: RunFolder, name: str) -> Checkpoints:
    """Return the checkpoints with the model of a finished run."""
    return Checkpoints(folder.path / name / "model", keep=1, asynchronous=False)
