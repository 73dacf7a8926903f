"""Runs inside a run folder: each is made once, resumed after a stop, and has its own folder."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from effscale.training import (
    Checkpoints,
    ConsoleWriter,
    JsonlWriter,
    MultiWriter,
    RunFolder,
    StagedStep,
    TensorBoardWriter,
    fit,
    resume_or_start,
    run_folder,
)
from effscale.training.errors import StoppedBySignal
from effscale.training.loop import FitResult
from effscale.training.metrics import MetricsWriter
from effscale.training.state import CountsSteps

S = TypeVar("S", bound=CountsSteps)


def once(folder: RunFolder, name: str, train: Callable[[], object]) -> None:
    """Make one of the runs of a run folder, or skip a finished one; see ``effscale.training.run_folder.once``.

    Args:
        folder: The run folder.
        name: Name of the run and of its folder inside the run folder.
        train: Makes the run, or resumes it from its checkpoint.
    """

    def work() -> dict[str, Any]:
        if jax.process_index() == 0:
            print(name, file=sys.stderr)
        train()
        return {}

    run_folder.once(folder.path / name, work)


def train_to_end(
    folder: RunFolder,
    name: str,
    step: Callable[[S, Any], Any],
    batches: Any,
    *,
    create: Callable[[], S],
    num_steps: int,
    evaluate: Callable[[S], Mapping[str, float]],
    every: int,
    restage: Callable[[], StagedStep] | None = None,
    wrap_writer: Callable[[MetricsWriter], MetricsWriter] = lambda writer: writer,
    frozen: Any = None,
    layout: Any = None,
    trace_create: bool = True,
    place_batch: Callable[[Any], Any] | None = None,
    compile_first: bool = True,
) -> S:
    """Train one of the runs of a run folder, from the start or from its checkpoint, in its own folder.

    Args:
        folder: The run folder.
        name: Name of the run.
        step: The training step.
        batches: An iterator whose position can be saved.
        create: Creates the state before the first step.
        num_steps: Number of steps of the whole run.
        evaluate: A function from a state to metrics.
        every: Steps between evaluations, and between checkpoints.
        restage: As in ``run_to_end``.
        wrap_writer: Wraps the writer of metrics.
        frozen: As in ``effscale.training.fit``.
        layout: Shardings of the state; None leaves it on one device.
        trace_create: As in ``effscale.training.resume_or_start``.
        place_batch: Puts a batch on the devices.
        compile_first: As in ``run_to_end``.

    Returns:
        The last state.

    Raises:
        StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
    """
    place = folder.path / name
    with Checkpoints(place / "checkpoints", keep=1, every=every) as checkpoints:
        fitted = run_to_end(
            step,
            batches,
            checkpoints,
            writer_of=lambda start: wrap_writer(writer_of_run(folder, name, num_steps, start)),
            create=create,
            num_steps=num_steps,
            evaluate=evaluate,
            eval_every=every,
            restage=restage,
            compile_first=compile_first,
            frozen=frozen,
            layout=layout,
            trace_create=trace_create,
            place_batch=place_batch,
        )
    if fitted.stopped_reason == "signal":
        reached = int(fitted.state.step)
        raise StoppedBySignal(f"stopped and saved {name} at step {reached}", fitted.signal)
    return fitted.state


def run_to_end(
    step: Callable[[S, Any], Any],
    batches: Any,
    checkpoints: Checkpoints,
    *,
    writer_of: Callable[[int], MetricsWriter],
    create: Callable[[], S],
    num_steps: int,
    evaluate: Callable[[S], Mapping[str, float]],
    eval_every: int,
    resume: bool = True,
    restage: Callable[[], StagedStep] | None = None,
    compile_first: bool = True,
    frozen: Any = None,
    layout: Any = None,
    trace_create: bool = True,
    place_batch: Callable[[Any], Any] | None = None,
) -> FitResult:
    """Train from the start, or from the newest checkpoint: the loop of every experiment.

    Args:
        step: The training step.
        batches: An iterator whose position can be saved.
        checkpoints: The checkpoints of the run.
        writer_of: Creates the writer of metrics, given the first step; it is closed here.
        create: Creates the state before the first step.
        num_steps: Number of steps of the whole run.
        evaluate: A function from a state to metrics.
        eval_every: Steps between evaluations.
        resume: As in ``resume_or_start``.
        restage: Creates another ``StagedStep`` like ``step``, for a run that resumes in the middle of its schedule.
            It skips earlier shapes, which ``step`` must keep for runs with other seeds.
        compile_first: If the step is a ``StagedStep``, compile all shapes before the second step, so that no
            compilation shares the machine with timed steps.
        frozen: As in ``effscale.training.fit``.
        layout: Shardings of the state; None leaves it on one device.
        trace_create: As in ``effscale.training.resume_or_start``.
        place_batch: Puts a batch on the devices.

    Returns:
        The result of ``fit``; the caller must handle a signal.
    """
    options = {"resume": resume, "shardings": layout, "trace_create": trace_create}
    state, start = resume_or_start(checkpoints, create, batches, **options)
    another = restage() if restage is not None and start > 0 else None
    stepped = step if another is None else another
    staged = stepped if isinstance(stepped, StagedStep) else None

    def before_step(number: int, batch: Any) -> Any:
        if staged is None:
            return batch
        if compile_first and number == start + 1:
            staged.wait()
        return staged.before_step(number, batch)

    writer = writer_of(start)
    try:
        return fit(
            state,
            stepped,
            batches,
            num_steps=num_steps,
            frozen=frozen,
            checkpoints=checkpoints,
            writer=writer,
            evaluate=evaluate,
            eval_every=eval_every,
            place_batch=place_batch,
            before_step=before_step,
        )
    finally:
        writer.close()
        if another is not None:
            another.close()


def writer_of_run(folder: RunFolder, name: str, num_steps: int, start: int) -> MultiWriter:
    """Create the metrics writer of a run that continues from the step ``start``; only the first of several processes writes."""
    if jax.process_index():
        return MultiWriter([])
    return MultiWriter(
        [
            JsonlWriter(folder.path / name / "metrics.jsonl", resume_step=start),
            TensorBoardWriter(folder.tensorboard / name, resume_step=start),
            ConsoleWriter(num_steps, start_step=start),
        ]
    )
