"""The classifier of the experiment ``zeroquant``: fine-tuned, then evaluated with each arm."""

import functools
import json
import pathlib
from typing import Any

import jax

from effscale.experiments.shared.classifier.batches import TrainingBatches, evaluation_batches
from effscale.experiments.shared.classifier.model import class_loss, classifier, make_step
from effscale.experiments.shared.classifier.problem import Problem
from effscale.experiments.shared.runs import once, train_to_end
from effscale.experiments.zeroquant.arms import Calibration, make_arms, quantized
from effscale.experiments.zeroquant.config import Config
from effscale.models import Transformer
from effscale.training import (
    RunFolder,
    ScheduleConfig,
    ShapeBuckets,
    TrainState,
    create_train_state,
    evaluate,
    make_eval_step,
)
from effscale.training.serialize import write_json


class ClassifierRuns:
    """Fine-tunes the classifier with one seed after another and evaluates each with every arm.

    Args:
        problem: The task.
        config: Config of the experiment.
        folder: The run folder.
    """

    def __init__(self, problem: Problem, config: Config, folder: RunFolder):
        self.problem, self.config, self.folder = problem, config, folder
        self.arms = make_arms(config.group_size)
        others = ("lkd_long", "lkd_random")
        mine = (name for name in config.arms if self.arms[name].method not in others)
        self.names = ("float32", *mine)
        schedule = ScheduleConfig(
            kind="linear",
            peak=problem.recipe.learning_rate,
            warmup=int(config.warmup * problem.steps),
            total=problem.steps,
        ).build()
        self.optimizer, step = make_step(
            config.optimizer, schedule, clip_norm=config.clip_norm, dropout=False
        )
        self.train_step = ShapeBuckets(step, donate_argnums=0)
        self.eval_step = jax.jit(make_eval_step(class_loss))

    def run(self) -> None:
        """Run every seed that is not done yet."""
        for seed in range(self.config.seeds):
            once(self.folder, f"minilm/seed-{seed}", functools.partial(self._run, seed))

    def found(self, seed: int) -> dict[str, Any]:
        """Return the results of ``run`` for a seed: by arm, the accuracy and the bytes of the layers."""
        return json.loads(self._file(seed).read_text(encoding="utf-8"))

    def _file(self, seed: int) -> pathlib.Path:
        return self.folder.path / f"minilm/seed-{seed}" / "accuracies.json"

    def _run(self, seed: int) -> None:
        size = self.problem.recipe.batch_size
        batches = TrainingBatches(self.problem.data.train, batch_size=size, seed=seed)
        state = train_to_end(
            self.folder,
            f"minilm/seed-{seed}",
            self.train_step,
            batches,
            create=functools.partial(self._create, seed),
            num_steps=self.problem.steps,
            evaluate=lambda state: self._measure(state.model, "test_"),
            every=self.problem.per_epoch,
        )
        found = {}
        for name in self.names:
            lkd = self.config.classifier_lkd
            model = quantized(state.model, self.arms[name], self._calibration, lkd)
            found[name] = self._measure(model, "") | {
                "bytes": sum(x.nbytes for x in jax.tree.leaves(model.groups))
            }
        write_json(self._file(seed), found)

    def _create(self, seed: int) -> TrainState:
        model = classifier(self.problem.model, self.problem.data.num_classes, seed)
        return create_train_state(model, self.optimizer, key=jax.random.key(seed))

    def _measure(self, model: Transformer, prefix: str) -> dict[str, float]:
        batches = evaluation_batches(self.problem.data.test, self.problem.recipe.batch_size)
        means = evaluate(model, self.eval_step, batches, prefix=prefix)
        return {f"{prefix}{name}": means[f"{prefix}{name}"] for name in ("loss", "accuracy")}

    def _calibration(self) -> Calibration:
        """Return the longest training reviews, which have the same shape, without labels."""
        texts, size = self.problem.data.train, self.problem.recipe.batch_size
        found = [
            {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            for batch in evaluation_batches(texts, size)
        ]
        longest = max(batch["input_ids"].shape[1] for batch in found)
        return Calibration([batch for batch in found if batch["input_ids"].shape[1] == longest], [])
