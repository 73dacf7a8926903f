"""Runs inside a run folder: each made once, continued after a stop, with all of its files in a folder of its own."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from effscale.experiments.shared.cli import StoppedBySignal
from effscale.parallel import on_first
from effscale.training import (
    Checkpoints,
    ConsoleWriter,
    CountsSteps,
    FitResult,
    JsonlWriter,
    MetricsWriter,
    MultiWriter,
    RunFolder,
    StagedStep,
    TensorBoardWriter,
    fit,
    resume_or_start,
)
from effscale.training.serialize import write_json

S = TypeVar("S", bound=CountsSteps)


def once(folder: RunFolder, name: str, train: Callable[[], object]) -> None:
    """Makes one of the runs that a run folder holds, or leaves a finished one as it is.

    The ``seconds`` of its ``done.json``, and its ``cpu_seconds`` over all threads, are those of all calls that ended it or were asked to
    stop in it, compilations and evaluations included; of a call that was killed nothing is known.

    Args:
        folder: The run folder.
        name: The run, which is also its own folder inside.
        train: Makes it, or goes on with it from its checkpoint.
    """
    place = folder.path / name
    done = place / "done.json"
    if done.is_file():
        return
    first = jax.process_index() == 0  # of several processes, the one that writes
    if first:
        print(name, file=sys.stderr)
    earlier = place / "seconds.json"  # those of calls before this one
    before = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else {}
    clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
    began = {name: clock() for name, clock in clocks.items()}
    spent = lambda: {n: before.get(n, 0.0) + clock() - began[n] for n, clock in clocks.items()}
    try:
        train()
    except StoppedBySignal:
        if first:
            write_json(earlier, spent())
        raise

    def finish() -> None:
        write_json(done, spent())
        earlier.unlink(missing_ok=True)
        # Of no use to a finished run, and three times the model's size.
        shutil.rmtree(place / "checkpoints", ignore_errors=True)

    on_first(finish)


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
    """Trains one of the runs of a run folder, from the start or from its checkpoint, with all of its files in a folder of its own.

    Args:
        folder: The run folder.
        name: The run.
        step: The training step.
        batches: An iterator whose position can be saved.
        create: Makes the state before the first step.
        num_steps: Steps of the whole run.
        evaluate: From a state to metrics.
        every: Steps between evaluations, and between checkpoints.
        restage: As in ``run_to_end``.
        wrap_writer: What is put around the writer of metrics.
        frozen: As in ``effscale.training.fit``.
        layout: Shardings of the state; None leaves it on one device.
        trace_create: As in ``effscale.training.resume_or_start``.
        place_batch: Puts a batch on the devices.
        compile_first: As in ``run_to_end``.

    Returns:
        The last state.

    Raises:
        StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
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
    """Trains from the start, or from the newest checkpoint: the loop of every experiment.

    Args:
        step: The training step.
        batches: An iterator whose position can be saved.
        checkpoints: The run's.
        writer_of: Makes the writer of metrics, from the step that the run begins with; it is closed here.
        create: Makes the state before the first step.
        num_steps: Steps of the whole run.
        evaluate: From a state to metrics.
        eval_every: Steps between evaluations.
        resume: As in ``resume_or_start``.
        restage: Makes another ``StagedStep`` like ``step``, for a run that continues in the middle of its schedule. It leaves out the
            shapes behind it, which ``step`` must have for the run of another seed.
        compile_first: Where the step is a ``StagedStep``, let the second step wait until all shapes are compiled, so that no compilation
            shares the machine with steps whose time is taken.
        frozen: As in ``effscale.training.fit``.
        layout: Shardings of the state; None leaves it on one device.
        trace_create: As in ``effscale.training.resume_or_start``.
        place_batch: Puts a batch on the devices.

    Returns:
        What ``fit`` returns; a signal is left to the caller.
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
    """The metrics of a run that goes on from the step ``start``; of several processes the first writes them."""
    if jax.process_index():
        return MultiWriter([])
    return MultiWriter(
        [
            JsonlWriter(folder.path / name / "metrics.jsonl", resume_step=start),
            TensorBoardWriter(folder.tensorboard / name, resume_step=start),
            ConsoleWriter(num_steps, start_step=start),
        ]
    )
