"""The runs of the experiment ``finetune``: one per task, seed and backend (effscale or PyTorch)."""

import functools
from collections.abc import Iterator

import jax

from effscale.experiments.finetune import torch_twin
from effscale.experiments.finetune.config import Config
from effscale.experiments.shared.classifier.batches import (
    Batch,
    TrainingBatches,
    evaluation_batches,
)
from effscale.experiments.shared.classifier.model import class_loss, classifier, make_step
from effscale.experiments.shared.classifier.problem import Problem
from effscale.experiments.shared.runs import once, train_to_end, writer_of_run
from effscale.study.command import StoppedBySignal
from effscale.training import (
    RunFolder,
    ScheduleConfig,
    ShapeBuckets,
    TrainState,
    create_train_state,
    evaluate,
    make_eval_step,
)


class Runner:
    """Runs a problem for one backend and seed after another; effscale's programs are compiled once for all seeds.

    Args:
        problem: The task.
        config: Config of the experiment.
        folder: The run folder, in which each run gets its own folder.
    """

    def __init__(self, problem: Problem, config: Config, folder: RunFolder):
        self.problem, self.config, self.folder = problem, config, folder
        self.schedule = ScheduleConfig(
            kind="linear",
            peak=problem.recipe.learning_rate,
            warmup=int(config.warmup * problem.steps),
            total=problem.steps,
        ).build()
        self.optimizer, step = make_step(
            config.optimizer, self.schedule, clip_norm=config.clip_norm, dropout=config.dropout
        )
        self.train_step = ShapeBuckets(step, donate_argnums=0)
        self.eval_step = jax.jit(make_eval_step(class_loss))

    def run(self, backend: str, seed: int) -> None:
        """Start a run, resume one that was stopped, or skip a finished one.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """
        size = self.problem.recipe.batch_size
        batches = TrainingBatches(self.problem.data.train, batch_size=size, seed=seed)
        train = self._torch if backend == "torch" else self._ours
        name = f"{self.problem.task}/seed-{seed}/{backend}"
        once(self.folder, name, lambda: train(name, batches, seed))

    def _ours(self, name: str, batches: TrainingBatches, seed: int) -> None:
        def validate(state: TrainState) -> dict[str, float]:
            means = evaluate(state.model, self.eval_step, self._test(), prefix="test_")
            return {"test_loss": means["test_loss"], "test_accuracy": means["test_accuracy"]}

        train_to_end(
            self.folder,
            name,
            self.train_step,
            batches,
            create=functools.partial(self._create, seed),
            num_steps=self.problem.steps,
            evaluate=validate,
            every=self.problem.per_epoch,
        )

    def _torch(self, name: str, batches: TrainingBatches, seed: int) -> None:
        config, problem = self.config, self.problem
        dense = classifier(problem.model, problem.data.num_classes, seed).heads["classes"].dense
        twin = torch_twin.Twin(
            folder=problem.folder,
            image_size=None if problem.task == "reviews" else config.image_size,
            kernel=jax.device_get(dense.kernel.get_value()),
            bias=jax.device_get(dense.bias.get_value()),
            optimizer=config.optimizer,
            clip_norm=config.clip_norm,
            rates=[float(self.schedule(step)) for step in range(problem.steps)],
            dropout=config.dropout,
            seed=seed,
        )
        file = self.folder.path / name / "checkpoints" / "last.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        writer_of = functools.partial(writer_of_run, self.folder, name, problem.steps)
        signal = torch_twin.train(twin, batches, self._test, writer_of=writer_of, checkpoint=file)
        if signal is not None:
            raise StoppedBySignal(f"stopped and saved {name} at step {batches.step}", signal)

    def _create(self, seed: int) -> TrainState:
        model = classifier(self.problem.model, self.problem.data.num_classes, seed)
        return create_train_state(model, self.optimizer, key=jax.random.key(seed))

    def _test(self) -> Iterator[Batch]:
        return evaluation_batches(self.problem.data.test, self.problem.recipe.batch_size)
