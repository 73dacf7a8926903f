"""The training loop."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from effscale.training.checkpoint import Checkpoints
from effscale.training.errors import CheckpointError, TrainingDivergedError
from effscale.training.metrics import MetricsWriter, plain
from effscale.training.partition import named_leaves
from effscale.training.signals import StopSignal
from effscale.training.state import CountsSteps, abstract

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=CountsSteps)
T = TypeVar("T")


class FitResult(NamedTuple):
    """The result of ``fit``.

    Attributes:
        state: The final state.
        history: The records written: ``{"step": ..., "loss": ...}``.
        stopped_reason: ``finished``, ``signal`` (SIGTERM or Ctrl-C: the state was saved, so you can resume) or ``data``
            (the data ended).
        signal: The number of the signal, or None.
    """

    state: Any
    history: list[dict[str, Any]]
    stopped_reason: str
    signal: int | None = None


def fit(
    state: S,
    step_fn: Callable[..., tuple[S, Mapping[str, Any]]],
    data_iterator: Iterator[Any],
    *,
    num_steps: int,
    frozen: Any = None,
    checkpoints: Checkpoints | None = None,
    writer: MetricsWriter | None = None,
    evaluate: Callable[[S], Mapping[str, Any]] | None = None,
    eval_every: int | None = None,
    log_every: int = 1,
    max_skipped_in_row: int = 10,
    place_batch: Callable[[Any], Any] | None = None,
    before_step: Callable[[int, Any], Any] | None = None,
    sync_every: int = 16,
) -> FitResult:
    """Train until ``state.step`` reaches ``num_steps``.

    Metrics are read one step late: while the device computes a step, the host fetches the metrics of the previous one, so that
    no step waits for the host. A run resumed from a checkpoint writes the same records as an uninterrupted one.

    Args:
        state: The initial state: a ``TrainState``, or any pytree whose ``step`` is the number of batches consumed
            (`effscale.training.CountsSteps`).
        step_fn: ``step_fn(state, batch) -> (state, metrics)``, which adds one to ``step``: the result of ``make_train_step``,
            wrapped in ``ShapeBuckets`` or ``jax.jit``, or a custom function. It may donate the state.
        data_iterator: The batches; with ``checkpoints``, their position is saved with ``get_state``.
        num_steps: The number of steps of the whole run, including those before a resume.
        frozen: What the step reads without changing it, such as a teacher or a reference model: any pytree, already on the
            devices. The step is then called as ``step_fn(state, batch, frozen=frozen)``. It is not saved in checkpoints, so pass
            it again to resume.
        checkpoints: Saves at its interval ``every``, when a signal stops the run, and at the end.
        writer: Receives the metrics; used only on process 0.
        evaluate: ``evaluate(state) -> metrics``; called every ``eval_every`` steps and at the end.
        eval_every: The number of steps between evaluations; None evaluates only at the end.
        log_every: The number of steps between records.
        max_skipped_in_row: Stop after this number of consecutive skipped updates.
        place_batch: Converts a host batch to a device batch, for instance by sharding it over a mesh.
        before_step: ``before_step(step, batch) -> batch``, called on the host, for instance for a curriculum that crops
            the batch.
        sync_every: With several processes, the number of steps after which they agree whether to stop; they always do
            after the last step.

    Returns:
        The final state, the records and the reason why training ended.

    Raises:
        TrainingDivergedError: ``max_skipped_in_row`` updates in a row were skipped.
        CheckpointError: A checkpoint could not be written.
        ValueError: An option is out of range, or ``frozen`` is not on the devices of the state.
    """
    for name, value in {
        "log_every": log_every,
        "eval_every": 1 if eval_every is None else eval_every,
        "max_skipped_in_row": max_skipped_in_row,
    }.items():
        if not value >= 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    step = int(state.step)
    if step > num_steps:
        raise ValueError(
            f"num_steps must be at least {step}, the steps that the state has already made, got {num_steps}"
        )
    given = {} if frozen is None else {"frozen": check_on_device(frozen, state)}
    log = _Log(
        writer if jax.process_index() == 0 else None,
        log_every,
        max_skipped_in_row,
        checkpoints,
        state,
    )
    if checkpoints is not None:
        checkpoints.clean(step + 1)

    reason = "finished"
    # However the run ends, finish pending writes: the exit of Python would cut them off.
    with (
        contextlib.nullcontext() if checkpoints is None else checkpoints.settled(),
        StopSignal(sync_every=sync_every) as stop,
    ):
        while step < num_steps:
            try:
                batch = next(data_iterator)
            except StopIteration:
                reason = "data"
                logger.warning("the data ended after step %d of %d", step, num_steps)
                break
            if before_step is not None:
                batch = before_step(step, batch)
            if place_batch is not None:
                batch = place_batch(batch)
            state, metrics = step_fn(state, batch, **given)
            step += 1
            log.late(step, metrics)

            # Evaluate before saving the last checkpoint, so that a run resumed from it has nothing left to write.
            due = step == num_steps or (eval_every is not None and step % eval_every == 0)
            if evaluate is not None and due:
                log.catch_up()
                log.write(step, plain(evaluate(state)))
                log.restart_clock()
            if checkpoints is not None:
                checkpoints.check()
                if checkpoints.every is not None and step % checkpoints.every == 0:
                    log.catch_up()
                    log.flush()  # records up to here must be as durable as the checkpoint
                    checkpoints.save(step, state, data_iterator)
            # Check after the last step too: the caller would otherwise continue with an evaluation despite the signal.
            if stop.should_stop(step, last=step == num_steps):
                reason = "signal"
                logger.warning("received a signal to stop: saving at step %d", step)
                break
        log.catch_up()
        if evaluate is not None and reason == "data" and (eval_every is None or step % eval_every):
            log.write(step, plain(evaluate(state)))
        log.flush()
        if checkpoints is not None:
            checkpoints.wait()
            while checkpoints.save(step, state, data_iterator, force=True):
                checkpoints.wait()
    return FitResult(state, log.history, reason, stop.received if reason == "signal" else None)


def resume_or_start(
    checkpoints: Checkpoints,
    create: Callable[[], T],
    data_iterator: Any = None,
    *,
    resume: bool = True,
    step: int | None = None,
    shardings: Any = None,
    trace_create: bool = True,
) -> tuple[T, int]:
    """Restore the newest checkpoint, or create a new state, and set the data iterator to match.

    The newest checkpoint continues a run exactly, even if it was saved while updates were being skipped. To return to a
    checkpoint from before the skipped updates, pass the ``step`` that `TrainingDivergedError` names.

    Args:
        checkpoints: The checkpoints of the run.
        create: Creates a new state, a ``TrainState`` or any other pytree. When resuming, only its shapes are used, and nothing is
            computed.
        data_iterator: Its position is restored.
        resume: Whether to resume. False always starts a new run and requires a folder without checkpoints.
        step: The checkpoint to resume from instead of the newest. Newer ones are moved to ``set_aside/`` when the run saves.
        shardings: A state of shardings (``effscale.parallel.shardings``). None leaves everything on the first device,
            or where ``create`` puts it.
        trace_create: Whether to trace ``create``. False runs it eagerly, also when resuming, where only the shapes and
            shardings of its arrays are used. Use False if ``create`` reads weights from a file, which would become constants of
            the compiled program, and lays them out on a mesh.

    Returns:
        The state and its step; 0 for a new state without ``step``.

    Raises:
        CheckpointError: The checkpoints have a different config or are all damaged; or some exist and ``resume`` is False.
        FileNotFoundError: No checkpoint of ``step`` exists.
        ValueError: ``step`` is given and ``resume`` is False.
    """
    if step is not None and not resume:
        raise ValueError(f"step must be None with resume=False, got {step}")
    checkpoints.wait()
    if not resume and not checkpoints.is_empty:
        raise CheckpointError(
            f"{checkpoints.folder}: already contains checkpoints, and resume=False starts a new run. Choose another folder, or resume."
        )
    if resume and (step is not None or not checkpoints.is_empty):
        wanted = jax.eval_shape(create) if trace_create else abstract(create())
        if shardings is not None:
            place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            wanted = jax.tree.map(place, wanted, shardings)
        restored = checkpoints.restore(wanted, data_iterator, step)
        assert restored is not None
        logger.info("resuming from step %d of %s", restored.step, checkpoints.folder)
        return restored.state, restored.step
    if shardings is None:
        state = create()
    elif trace_create:
        state = jax.jit(create, out_shardings=shardings)()
    else:
        state = jax.device_put(create(), shardings)
    return state, int(getattr(state, "step", 0))


class _Log:
    """Passes metrics from the device to the writer, one step late."""

    def __init__(
        self,
        writer: MetricsWriter | None,
        log_every: int,
        max_skipped_in_row: int,
        checkpoints: Checkpoints | None,
        state: CountsSteps,
    ):
        self.history: list[dict[str, Any]] = []
        self._writer, self._log_every, self._checkpoints = writer, log_every, checkpoints
        self._max_skipped = max_skipped_in_row
        self._waiting: tuple[int, Mapping[str, Any]] | None = None
        self._tokens = int(getattr(state, "tokens", 0))
        self._clock: tuple[float, int] | None = None

    def late(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Accept the metrics of a step, and handle those of the previous one."""
        previous, self._waiting = self._waiting, (step, metrics)
        if previous is not None:
            self._handle(*previous)

    def catch_up(self) -> None:
        """Handle the pending metrics."""
        previous, self._waiting = self._waiting, None
        if previous is not None:
            self._handle(*previous)

    def _handle(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = plain(jax.device_get(dict(metrics)))  # one transfer for all of them
        self._tokens = int(values.get("tokens", self._tokens))
        if step % self._log_every == 0:
            self.write(step, values, self._timing() if "tokens" in values else None)
        skipped = int(values.get("skipped_in_row", 0))
        if skipped:
            logger.warning(
                "step %d: update skipped (loss %s), %d in a row", step, values.get("loss"), skipped
            )
        if skipped >= self._max_skipped:
            self._diverged(step, skipped)

    def write(
        self, step: int, values: Mapping[str, Any], timing: Mapping[str, float] | None = None
    ) -> None:
        """Write a record immediately."""
        self.history.append({"step": step, **values})
        if self._writer is not None:
            self._writer.write(step, values, timing)

    def flush(self) -> None:
        """Flush the writer."""
        if self._writer is not None:
            self._writer.flush()

    def restart_clock(self) -> None:
        """Exclude the time since the last step from the speed."""
        self._clock = None

    def _timing(self) -> dict[str, float]:
        """Return the speed since the previous record; the first record has none, as it includes the compilation."""
        now, last = time.perf_counter(), self._clock
        self._clock = (now, self._tokens)
        if last is None or now == last[0]:
            return {}
        return {"tokens_per_second": (self._tokens - last[1]) / (now - last[0])}

    def _diverged(self, step: int, skipped: int) -> None:
        self.flush()
        last = where = None
        if self._checkpoints is not None:
            self._checkpoints.wait()
            last, where = self._checkpoints.last_good, str(self._checkpoints.folder)
        raise TrainingDivergedError(step, skipped, last, where or "")


Tree = TypeVar("Tree")


def check_on_device(frozen: Tree, state: Any) -> Tree:
    """Return ``frozen`` unchanged, after checking that its arrays need no transfer to the devices of the state at every step.

    Raises:
        ValueError: An array is on the host, or on fewer devices than the state.
    """
    wanted = max((_num_devices(x) for x in jax.tree.leaves(state)), default=1)
    for name, x, *_ in named_leaves(frozen):
        found = _num_devices(x)
        if np.ndim(x) == 0 or found >= wanted:
            continue
        where = f"on {found} of the state's {wanted} devices" if found else "on the host"
        place = "jax.device_put(frozen)" if wanted == 1 else "effscale.parallel.shard(frozen, mesh)"
        raise ValueError(
            f"{name} of frozen is {where}, so it would be copied at every step. Place it once with {place}."
        )
    return frozen


def _num_devices(x: Any) -> int:
    return len(x.sharding.device_set) if isinstance(x, jax.Array) else 0
