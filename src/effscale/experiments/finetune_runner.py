"""The runs of the experiment ``finetune``: of a task, one a seed and backend, effscale or its twin in PyTorch."""

import dataclasses
import functools
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from effscale.experiments import assets, finetune_data, finetune_torch
from effscale.experiments.cli import StoppedBySignal
from effscale.experiments.finetune_batches import Batch, TrainingBatches, evaluation_batches
from effscale.experiments.finetune_data import Data
from effscale.experiments.finetune_model import class_loss, classifier, make_step
from effscale.interop import load_pretrained, load_tokenizer
from effscale.models import TokenInputs, Transformer, resize_images
from effscale.models.validation import check
from effscale.training import (
    Checkpoints,
    ConsoleWriter,
    JsonlWriter,
    MultiWriter,
    RunFolder,
    ScheduleConfig,
    ShapeBuckets,
    TensorBoardWriter,
    TrainState,
    create_train_state,
    evaluate,
    fit,
    make_eval_step,
    resume_or_start,
)
from effscale.training.serialize import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A task with its data and its pretrained model.

    Attributes:
        task: Its name.
        recipe: How it is learned, a ``finetune.Recipe``.
        data: The examples.
        folder: The pretrained model's.
        model: That model, with images of the wanted size; its heads are not used.
    """

    task: str
    recipe: Any
    data: Data
    folder: pathlib.Path
    model: Transformer

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return len(self.data.train) // self.recipe.batch_size

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return self.per_epoch * self.recipe.epochs


def prepare(task: str, recipe: Any, config: Any) -> Problem:
    """Reads a task's data and model.

    Args:
        task: ``reviews``, ``digits`` or ``fashion``.
        recipe: How it is learned, a ``finetune.Recipe``.
        config: A ``finetune.Config``.
    """
    sizes = (recipe.train, recipe.test)
    if task == "reviews":
        folder = config.text_model or assets.minilm_folder()
        data = finetune_data.reviews_data(load_tokenizer(folder), config.max_length, *sizes)
        model = load_pretrained(folder)
        if not isinstance(model.config.inputs, TokenInputs) or model.config.causal:
            raise ValueError(f"text_model={str(folder)!r} is no BERT, which this experiment needs")
        longest = model.config.max_length or config.max_length
        check(config, config.max_length <= longest, "max_length", f"at most the model's {longest}")
    else:
        if task == "digits":
            data = finetune_data.digits_data(config.image_size, *sizes)
        else:
            data = finetune_data.fashion_data(config.fashion_mnist, config.image_size, *sizes)
        folder = config.image_model or assets.focus_vit_folder()
        model = resize_images(load_pretrained(folder), config.image_size)
    wanted = f"at most the {len(data.train)} training examples"
    check(recipe, recipe.batch_size <= len(data.train), "batch_size", wanted)
    return Problem(task=task, recipe=recipe, data=data, folder=folder, model=model)


class Runner:
    """Runs a problem for one backend and seed after another; ours are compiled once for all seeds.

    Args:
        problem: The task.
        config: A ``finetune.Config``.
        folder: The run folder, in which each run gets a folder of its own.
    """

    def __init__(self, problem: Problem, config: Any, folder: RunFolder):
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
        """Makes a run, goes on with one that was stopped, or leaves a finished one as it is.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
        """
        name = f"{self.problem.task}/seed-{seed}/{backend}"
        place = self.folder.path / name
        done = place / "done.json"
        if done.is_file():
            return
        print(name, file=sys.stderr)
        began = time.perf_counter()
        size = self.problem.recipe.batch_size
        batches = TrainingBatches(self.problem.data.train, batch_size=size, seed=seed)
        train = self._torch if backend == "torch" else self._ours
        train(place, name, batches, seed)
        write_json(done, {"seconds": time.perf_counter() - began})
        # Of no use to a finished run, and three times the model's size.
        shutil.rmtree(place / "checkpoints", ignore_errors=True)

    def _ours(self, place: pathlib.Path, name: str, batches: TrainingBatches, seed: int) -> None:
        def validate(state: TrainState) -> dict[str, float]:
            means = evaluate(state.model, self.eval_step, self._test(), prefix="test_")
            return {"test_loss": means["test_loss"], "test_accuracy": means["test_accuracy"]}

        every = self.problem.per_epoch
        with Checkpoints(place / "checkpoints", keep=1, every=every) as checkpoints:
            create = functools.partial(self._create, seed)
            state, start = resume_or_start(checkpoints, create, batches)
            writer = self._writer(place, name, start)
            try:
                fitted = fit(
                    state,
                    self.train_step,
                    batches,
                    num_steps=self.problem.steps,
                    checkpoints=checkpoints,
                    writer=writer,
                    evaluate=validate,
                    eval_every=every,
                )
            finally:
                writer.close()
        if fitted.stopped_reason == "signal":
            raise StoppedBySignal(f"stopped and saved {name} at step {int(fitted.state.step)}")

    def _torch(self, place: pathlib.Path, name: str, batches: TrainingBatches, seed: int) -> None:
        config, problem = self.config, self.problem
        dense = classifier(problem.model, problem.data.num_classes, seed).heads["classes"].dense
        twin = finetune_torch.Twin(
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
        file = place / "checkpoints" / "last.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        writer_of = functools.partial(self._writer, place, name)
        step = finetune_torch.train(twin, batches, self._test, writer_of=writer_of, checkpoint=file)
        if step < problem.steps:
            raise StoppedBySignal(f"stopped and saved {name} at step {step}")

    def _create(self, seed: int) -> TrainState:
        model = classifier(self.problem.model, self.problem.data.num_classes, seed)
        return create_train_state(model, self.optimizer, key=jax.random.key(seed))

    def _test(self) -> Iterator[Batch]:
        return evaluation_batches(self.problem.data.test, self.problem.recipe.batch_size)

    def _writer(self, place: pathlib.Path, name: str, step: int) -> MultiWriter:
        """For a run that goes on from ``step``."""
        events = self.folder.tensorboard / name
        return MultiWriter(
            [
                JsonlWriter(place / "metrics.jsonl", resume_step=step),
                TensorBoardWriter(events, resume_step=step),
                ConsoleWriter(self.problem.steps, start_step=step),
            ]
        )
