"""The runs of the experiment ``finetune``: of a task, one a seed and backend, effscale or its twin in PyTorch."""

import dataclasses
import functools
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from effscale.experiments import assets, finetune_data, finetune_torch
from effscale.experiments.cli import StoppedBySignal
from effscale.experiments.finetune_batches import Batch, TrainingBatches, digest, evaluation_batches
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
    StagedStep,
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

    def digests(self) -> dict[str, Any]:
        """What identifies the examples and the pretrained model, for `RunFolder.create`."""
        return {
            "train": {"examples": len(self.data.train), "digest": digest(self.data.train.arrays())},
            "test": {"examples": len(self.data.test), "digest": digest(self.data.test.arrays())},
            "model": {"digest": digest(jax.device_get(jax.tree.leaves(self.model)))},
        }


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
        file = self.folder.path / name / "checkpoints" / "last.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        writer_of = functools.partial(writer_of_run, self.folder, name, problem.steps)
        signal = finetune_torch.train(
            twin, batches, self._test, writer_of=writer_of, checkpoint=file
        )
        if signal is not None:
            raise StoppedBySignal(f"stopped and saved {name} at step {batches.step}", signal)

    def _create(self, seed: int) -> TrainState:
        model = classifier(self.problem.model, self.problem.data.num_classes, seed)
        return create_train_state(model, self.optimizer, key=jax.random.key(seed))

    def _test(self) -> Iterator[Batch]:
        return evaluation_batches(self.problem.data.test, self.problem.recipe.batch_size)


def once(folder: RunFolder, name: str, train: Callable[[], object]) -> None:
    """Makes one of the runs that a run folder holds, or leaves a finished one as it is.

    The ``seconds`` of its ``done.json`` are those of all calls that ended it or were asked to stop in it, compilations and
    evaluations included; of a call that was killed nothing is known.

    Args:
        folder: The run folder.
        name: The run, which is also its own folder inside.
        train: Makes it, or goes on with it from its checkpoint.
    """
    place = folder.path / name
    done = place / "done.json"
    if done.is_file():
        return
    print(name, file=sys.stderr)
    earlier = place / "seconds.json"  # those of calls before this one
    before = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else 0.0
    began = time.perf_counter()
    try:
        train()
    except StoppedBySignal:
        write_json(earlier, before + time.perf_counter() - began)
        raise
    write_json(done, {"seconds": before + time.perf_counter() - began})
    earlier.unlink(missing_ok=True)
    # Of no use to a finished run, and three times the model's size.
    shutil.rmtree(place / "checkpoints", ignore_errors=True)


def train_to_end(
    folder: RunFolder,
    name: str,
    step: Callable[[TrainState, Any], Any],
    batches: Any,
    *,
    create: Callable[[], TrainState],
    num_steps: int,
    evaluate: Callable[[TrainState], Mapping[str, float]],
    every: int,
    restage: Callable[[], StagedStep] | None = None,
) -> TrainState:
    """Trains from the start, or from the run's checkpoint, with all files of the run in its own folder.

    Where the step is a ``StagedStep``, the second one waits until all shapes are compiled, so that no compilation shares
    the machine with steps whose time is taken.

    Args:
        folder: The run folder.
        name: The run.
        step: The training step.
        batches: An iterator whose position can be saved.
        create: Makes the state before the first step.
        num_steps: Steps of the whole run.
        evaluate: From a state to metrics.
        every: Steps between evaluations, and between checkpoints.
        restage: Makes another ``StagedStep`` like ``step``, for a run that goes on in the middle of its schedule. It leaves the
            shapes behind it out, and ``step`` must have them for the run of another seed.

    Returns:
        The last state.

    Raises:
        StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
    """
    with Checkpoints(folder.path / name / "checkpoints", keep=1, every=every) as checkpoints:
        state, start = resume_or_start(checkpoints, create, batches)
        another = restage() if restage is not None and start > 0 else None
        stepped = step if another is None else another
        staged = stepped if isinstance(stepped, StagedStep) else None

        def before_step(number: int, batch: Any) -> Any:
            if staged is None:
                return batch
            if number == start + 1:
                staged.wait()
            return staged.before_step(number, batch)

        writer = writer_of_run(folder, name, num_steps, start)
        try:
            fitted = fit(
                state,
                stepped,
                batches,
                num_steps=num_steps,
                checkpoints=checkpoints,
                writer=writer,
                evaluate=evaluate,
                eval_every=every,
                before_step=before_step,
            )
        finally:
            writer.close()
            if another is not None:
                another.close()
    if fitted.stopped_reason == "signal":
        reached = int(fitted.state.step)
        raise StoppedBySignal(f"stopped and saved {name} at step {reached}", fitted.signal)
    return fitted.state


def writer_of_run(folder: RunFolder, name: str, num_steps: int, start: int) -> MultiWriter:
    """The metrics of a run that goes on from the step ``start``."""
    return MultiWriter(
        [
            JsonlWriter(folder.path / name / "metrics.jsonl", resume_step=start),
            TensorBoardWriter(folder.tensorboard / name, resume_step=start),
            ConsoleWriter(num_steps, start_step=start),
        ]
    )
