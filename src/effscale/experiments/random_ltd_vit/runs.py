"""The runs of the experiment ``random_ltd_vit``: one per arm and seed."""

import functools
import itertools
from typing import Any

import jax

from effscale.experiments.random_ltd_vit.config import Config
from effscale.experiments.shared.classifier.batches import TrainingBatches, evaluation_batches
from effscale.experiments.shared.classifier.model import class_loss, classifier, classifier_config
from effscale.experiments.shared.classifier.problem import Problem
from effscale.experiments.shared.random_ltd.arms import Arm, ArmName, LearningRate
from effscale.experiments.shared.runs import once, train_to_end
from effscale.training import RunFolder, TrainState, create_train_state, evaluate, make_eval_step


class Runner:
    """Runs with or without random-LTD, compiled once for all seeds.

    Args:
        name: Name of the arm.
        problem: The images and the pretrained model.
        config: Config of the experiment.
    """

    def __init__(self, name: ArmName, problem: Problem, config: Config):
        self.problem, self.config = problem, config
        model: Any = classifier_config(problem.model.config, problem.data.num_classes)
        self.arm = Arm(
            name=name,
            model=model,
            dropping=config.ltd,
            length=model.inputs.num_tokens,
            batch_size=config.recipe.batch_size,
            num_steps=problem.steps,
        )
        warmup = round(config.warmup * problem.steps)
        rate = LearningRate(peak=config.recipe.learning_rate, warmup=warmup)
        self.optimizer = self.arm.optimizer(rate, config.optimizer)
        step = self.arm.train_step(class_loss, self.optimizer, clip_norm=config.clip_norm)
        self._restage = functools.partial(self.arm.staged, step)
        self.step = self._restage()
        self.eval_step = jax.jit(make_eval_step(class_loss))

    def name_of(self, seed: int) -> str:
        """Return the name of the run, which is also its folder inside the run folder."""
        return f"seed-{seed}/{self.arm.name}"

    def run(self, folder: RunFolder, seed: int) -> None:
        """Start a run, resume one that was stopped, or skip a finished one."""
        recipe = self.config.recipe
        batches = TrainingBatches(self.problem.data.train, batch_size=recipe.batch_size, seed=seed)
        once(
            folder,
            self.name_of(seed),
            lambda: train_to_end(
                folder,
                self.name_of(seed),
                self.step,
                batches,
                create=functools.partial(self._create, seed),
                num_steps=self.problem.steps,
                evaluate=self._evaluate,
                every=self.config.eval_every,
                restage=self._restage,
            ),
        )

    def _create(self, seed: int) -> TrainState:
        model = classifier(self.problem.model, self.problem.data.num_classes, seed)
        return create_train_state(model, self.optimizer, key=jax.random.key(seed))

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        def means(batches: int | None) -> dict[str, float]:
            test = evaluation_batches(self.problem.data.test, self.config.recipe.batch_size)
            return evaluate(state.model, self.eval_step, itertools.islice(test, batches))

        values = {"part_test_accuracy": means(self.config.eval_batches)["accuracy"]}
        if int(state.step) == self.problem.steps:
            last = means(None)
            values |= {f"test_{name}": last[name] for name in ("loss", "accuracy")}
        return values
