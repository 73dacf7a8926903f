"""Fine-tuning of pretrained models on passages, for experiments that evaluate pretraining."""

from collections.abc import Callable
from typing import Any

import jax

from effscale.experiments.shared.classifier.batches import TrainingBatches, evaluation_batches
from effscale.experiments.shared.classifier.data import Data
from effscale.experiments.shared.classifier.model import class_loss, classifier
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.models import Transformer
from effscale.run import Run
from effscale.training import (
    AdamWConfig,
    Clip,
    ScheduleConfig,
    TrainState,
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
