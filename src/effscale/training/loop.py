"""The training loop, to be read from top to bottom."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from effscale.training.checkpoint import Checkpoints
from effscale.training.errors import CheckpointError, TrainingDivergedError
from effscale.training.metrics import MetricsWriter, plain
from effscale.training.on_device import check_on_device
from effscale.training.signals import StopSignal
from effscale.training.state import CountsSteps, abstract

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=CountsSteps)
T = TypeVar("T")


class FitResult(NamedTuple):
    """What ``fit`` returns.

    Attributes:
        state: The last state.
        history: The records written: ``{"step": ..., "loss": ...}``.
        stopped_reason: ``finished``, ``signal`` (SIGTERM or Ctrl-C: saved, resume to go on) or ``data`` (it ended).
        signal: Number of the signal, or None.
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
    """Train until ``state.step`` is ``num_steps``.

    Metrics are read one step late: while the device works at a step, the host fetches the previous one's, so that
    no step waits for the host. A run resumed from a checkpoint writes the same records as one that never stopped.

    Args:
        state: Where to start: a ``TrainState``, or any pytree whose ``step`` says how many batches have been consumed
            (`effscale.training.CountsSteps`).
        step_fn: ``step_fn(state, batch) -> (state, metrics)``, which adds one to ``step``: from ``make_train_step``, through
            ``ShapeBuckets`` or ``jax.jit``, or of your own. It may donate the state.
        data_iterator: Batches; with ``checkpoints`` its position is saved through ``get_state``.
        num_steps: Steps of the whole run, those before a resume included.
        frozen: What the step reads and does not change, such as a teacher or a reference model: any pytree, already on the
            devices. The step is then called as ``step_fn(state, batch, frozen=frozen)``. It is in no checkpoint, so give it
            again to resume.
        checkpoints: Saves by its own ``every``, when stopped by a signal, and at the end.
        writer: Takes metrics; used on process 0 only.
        evaluate: ``evaluate(state) -> metrics``; called each ``eval_every`` steps and at the end.
        eval_every: None evaluates at the end only.
        log_every: Write metrics each that many steps.
        max_skipped_in_row: Stop when that many updates in a row have been skipped.
        place_batch: Host batch to device batch, for instance sharding it over a mesh.
        before_step: ``before_step(step, batch) -> batch``, on the host, where a curriculum crops the batch.
        sync_every: With several processes, how often they agree whether to stop; after the last step they do in any case.

    Returns:
        The final state, the records and why it ended.

    Raises:
        TrainingDivergedError: ``max_skipped_in_row`` updates in a row were skipped.
        CheckpointError: A checkpoint could not be written.
        ValueError: An option is out of range, or ``frozen`` is not where the state is.
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
        raise ValueError(f"num_steps={num_steps}, but the state has already made {step} steps")
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
    # However the run ends, what is being written is written to the end: Python's exit would cut it short.
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

            # The last evaluation comes before the last checkpoint: a run resumed from that has nothing left to write.
            due = step == num_steps or (eval_every is not None and step % eval_every == 0)
            if evaluate is not None and due:
                log.catch_up()
                log.write(step, plain(evaluate(state)))
                log.restart_clock()
            if checkpoints is not None:
                checkpoints.check()
                if checkpoints.every is not None and step % checkpoints.every == 0:
                    log.catch_up()
                    log.flush()  # records up to here must outlive whatever the checkpoint outlives
                    checkpoints.save(step, state, data_iterator)
            # After the last step, too: the caller would go on to evaluate what it was asked to leave.
            if stop.should_stop(step, last=step == num_steps):
                reason = "signal"
                logger.warning("a signal asks to stop: saving at step %d", step)
                break
        log.catch_up()
        if evaluate is not None and reason == "data" and (eval_every is None or step % eval_every):
            log.write(step, plain(evaluate(state)))
        log.flush()
        if checkpoints is not None:
            checkpoints.save(step, state, data_iterator, force=True)
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
    """Return the newest checkpoint's state, or a new one; the data iterator is set to match.

    The newest one continues a run exactly, even where it was saved amid skipped updates. To go back to before them, choose
    the ``step`` that `TrainingDivergedError` names.

    Args:
        checkpoints: Where to look.
        create: Makes a new state, a ``TrainState`` or any other pytree; to resume, only its shapes are taken, and nothing is
            computed.
        data_iterator: Its position is restored.
        resume: False always starts afresh, and wants a folder without checkpoints.
        step: The checkpoint to resume from in place of the newest. Newer ones are moved to ``set_aside/`` when the run saves.
        shardings: A state of shardings (``effscale.parallel.shardings``); None leaves everything on the first device,
            or where ``create`` puts it.
        trace_create: False runs ``create`` eagerly. When resuming, it is run as well, and only the shapes and shardings of its arrays are used. Use it where ``create`` reads
            weights from a file, which would become constants of the compiled program, and lays them out on a mesh.

    Returns:
        The state and its step; of a new state without ``step``, 0.

    Raises:
        CheckpointError: The checkpoints are of another config, or all damaged; or there are some and ``resume`` is False.
        FileNotFoundError: There is no checkpoint of ``step``.
        ValueError: A ``step`` is given and ``resume`` is False.
    """
    if step is not None and not resume:
        raise ValueError(f"step={step} is a checkpoint to resume from, but resume=False")
    checkpoints.wait()
    if not resume and not checkpoints.is_empty:
        raise CheckpointError(
            f"{checkpoints.folder} already holds checkpoints, and resume=False starts afresh; choose another folder, or resume"
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
    """Metrics on their way from the device to the writer, one step behind."""

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
        """Take a step's metrics, and handle those of the step before."""
        previous, self._waiting = self._waiting, (step, metrics)
        if previous is not None:
            self._handle(*previous)

    def catch_up(self) -> None:
        """Handle what still waits."""
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
        """Write a record at once."""
        self.history.append({"step": step, **values})
        if self._writer is not None:
            self._writer.write(step, values, timing)

    def flush(self) -> None:
        """Flush the writer."""
        if self._writer is not None:
            self._writer.flush()

    def restart_clock(self) -> None:
        """Leave the time since the last step out of the speed."""
        self._clock = None

    def _timing(self) -> dict[str, float]:
        """Speed since the record before; the first record has none, as it holds the compilation."""
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
