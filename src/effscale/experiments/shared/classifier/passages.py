"""Fine-tuning of pretrained models on passages, for experiments that evaluate pretraining."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from effscale.experiments.shared.classifier.batches import TrainingBatches, evaluation_batches
from effscale.experiments.shared.classifier.data import Data
from effscale.experiments.shared.classifier.model import class_loss, classifier, make_step
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.config_parts import PassagePart
from effscale.experiments.shared.runs import once, train_to_end
from effscale.interop import load_pretrained
from effscale.models import Transformer
from effscale.run import Run
from effscale.training import (
    AdamWConfig,
    Clip,
    RunFolder,
    ScheduleConfig,
    ShapeBuckets,
    TrainState,
    create_train_state,
    evaluate,
    make_eval_step,
)


def fine_tuning(data: Data, recipe: Recipe, model: Callable[[Any], Transformer]) -> Run:
    """Return the fine-tuning of models of one shape, compiled once for all.

    Args:
        data: The passages.
        recipe: The fine-tuning recipe.
        model: Creates a trunk with random weights from a key. Without a ``model``, ``fit_in`` fine-tunes that with a new
            head; a pretrained one has its head already, see ``classifier``.
    """
    per_epoch = len(data.train) // recipe.batch_size
    steps = per_epoch * recipe.epochs
    schedule = ScheduleConfig(
        kind="linear", peak=recipe.learning_rate, warmup=int(0.1 * steps), total=steps
    )
    eval_step = jax.jit(make_eval_step(class_loss))

    def test(state: TrainState) -> dict[str, float]:
        batches = evaluation_batches(data.test, recipe.batch_size)
        means = evaluate(state.model, eval_step, batches, prefix="test_")
        return {name: means[name] for name in ("test_loss", "test_accuracy")}

    return Run(
        model=lambda key: classifier(model(key), data.num_classes, key),
        data=lambda seed: TrainingBatches(data.train, batch_size=recipe.batch_size, seed=seed),
        num_steps=steps,
        loss=class_loss,
        optimizer=AdamWConfig(b2=0.98, weight_decay=0.01),
        learning_rate=schedule.build(),
        clip=Clip(1.0),
        evaluation=test,
        eval_every=per_epoch,
        checkpoint_every=per_epoch,
    )


class FineTuning:
    """Fine-tuning of models of one shape, compiled once for all.

    Args:
        config: Config of the experiment.
        data: The passages.
    """

    def __init__(self, config: PassagePart, data: Data):
        self.config, self.data, self.recipe = config, data, config.finetune
        self.per_epoch = len(data.train) // self.recipe.batch_size
        self.steps = self.per_epoch * self.recipe.epochs
        schedule = ScheduleConfig(
            kind="linear",
            peak=self.recipe.learning_rate,
            warmup=int(config.warmup * self.steps),
            total=self.steps,
        ).build()
        self.optimizer, step = make_step(
            config.optimizer, schedule, clip_norm=config.clip_norm, dropout=True
        )
        self.step = ShapeBuckets(step, donate_argnums=0)
        self.eval_step = jax.jit(make_eval_step(class_loss))

    def run(self, folder: RunFolder, parent: str, seed: int, *, like: str | None = None) -> None:
        """Start the run ``<parent>/passages``, resume it, or skip a finished one.

        Args:
            folder: The run folder.
            parent: The pretraining run whose model is fine-tuned.
            seed: Seed of the new head and the order of passages.
            like: If given, use a randomly initialized model with the shape of this pretraining run instead of a
            pretrained one.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """
        name = f"{parent}/passages"
        model = folder.path / (parent if like is None else like) / "model"
        batches = TrainingBatches(self.data.train, batch_size=self.recipe.batch_size, seed=seed)
        once(
            folder,
            name,
            lambda: train_to_end(
                folder,
                name,
                self.step,
                batches,
                create=functools.partial(self._create, model, seed, fresh=like is not None),
                num_steps=self.steps,
                evaluate=self._evaluate,
                every=self.per_epoch,
            ),
        )

    def _create(self, folder: pathlib.Path, seed: int, *, fresh: bool) -> TrainState:
        model = load_pretrained(folder)
        if fresh:
            model = Transformer(model.config, rngs=nnx.Rngs(seed))
        model = classifier(model, self.data.num_classes, seed)
        return create_train_state(model, self.optimizer, key=jax.random.key(seed))

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        batches = evaluation_batches(self.data.test, self.recipe.batch_size)
        means = evaluate(state.model, self.eval_step, batches, prefix="test_")
        return {name: means[name] for name in ("test_loss", "test_accuracy")}
