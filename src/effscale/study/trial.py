"""One arm of a study with one seed: trained once, resumed after a stop."""

import dataclasses
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from effscale.parallel.lowering import placed
from effscale.parallel.peers import on_first
from effscale.run import Run
from effscale.study.search import Point
from effscale.training import Checkpoints, read_jsonl
from effscale.training.errors import StoppedBySignal
from effscale.training.serialize import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One arm with one seed, as its function sees it.

    Attributes:
        arm: Name of the arm.
        seed: The seed.
        place: The folder of the trial.
        study: The folder of the study.
        point: What the search found for this arm; its start if there is no search, and None for an arm without one.
        tuning: Whether this trial belongs to the search, whose result must not be measured on the reported split.
    """

    arm: str
    seed: int
    place: pathlib.Path
    study: pathlib.Path
    point: Point | None = None
    tuning: bool = False

    def fit(
        self,
        run: Run,
        part: str = "",
        *,
        frozen: Any = None,
        keep_model: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """Train a run of this trial, resume it, or skip it if it is finished.

        Args:
            run: The run. Share it between the trials of an arm, so that it is compiled once.
            part: Name of this part of a trial with several, and of its folder.
            frozen: What the loss reads without training it, or a function that loads it, which a finished run does not call.
            keep_model: Whether to keep the model for ``model``.
            **options: Further options of ``Run.fit_in``.

        Returns:
            The last value of each metric, with ``updates``, ``seconds`` and ``cpu_seconds`` of the whole part, and
            ``step_seconds``, the time of its training steps alone.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
            TrainingDivergedError: The loss or gradient was not finite for ten steps in a row.
        """
        place = self.place / part

        def train() -> dict[str, Any]:
            trained = run.fit_in(
                place,
                seed=self.seed,
                frozen=frozen() if callable(frozen) else frozen,
                tensorboard=self.study / "tensorboard" / place.relative_to(self.study),
                compile_first=True,
                **options,
            )
            if keep_model:
                with _model(place) as kept:
                    kept.save(run.num_steps, trained.model, force=True)
            return {
                **trained.metrics,
                "updates": run.num_steps,
                "compilations": len(trained.compilations),
                "step_seconds": step_seconds(place, run),
            }

        print(place.relative_to(self.study), file=sys.stderr)
        return once(place, train)

    def model(self, run: Run, part: str = "", *, arm: str | None = None) -> Any:
        """Load the model that ``fit(..., keep_model=True)`` kept, of this trial or of another arm with the same seed.

        Raises:
            FileNotFoundError: The run has not been trained.
        """
        place = (self.place if arm is None else self.study / arm / f"seed-{self.seed}") / part
        like, mesh = jax.eval_shape(run.create).model, run.device_mesh()
        if mesh is not None:
            with jax.set_mesh(mesh):
                like = placed(like, mesh)
        with _model(place) as kept:
            restored = kept.restore(like)
        if restored is None:
            raise FileNotFoundError(f"{place}: has no model. Train {arm or self.arm} first")
        return restored.state


def once(
    place: pathlib.Path, train: Callable[[], dict[str, Any]], *, mark: str = "done.json"
) -> dict[str, Any]:
    """Do the work of a folder, or read its result if it is finished.

    Args:
        place: The folder; its checkpoints are removed at the end.
        train: Does the work, or continues it, and returns its metrics.
        mark: The file with the result, which is written last.

    Returns:
        The metrics, with ``seconds`` and ``cpu_seconds`` (over all threads) of all calls that finished the work or were
        stopped by a signal during it, with compilations and evaluations. Calls that were killed are not counted.
    """
    done, earlier = place / mark, place / f"spent-{mark}"
    on_first(lambda: place.mkdir(parents=True, exist_ok=True))
    if done.is_file():
        return _read(done)
    first = jax.process_index() == 0  # only the first of several processes writes
    before = _read(earlier) if earlier.is_file() else {}
    clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
    began = {name: clock() for name, clock in clocks.items()}
    spent = lambda: {n: before.get(n, 0.0) + clock() - began[n] for n, clock in clocks.items()}
    try:
        metrics = train() | spent()
    except StoppedBySignal:
        if first:
            write_json(earlier, spent())
        raise

    def finish() -> None:
        number = lambda x: None if isinstance(x, float) and np.isnan(x) else x  # JSON has no NaN
        write_json(done, {name: number(value) for name, value in metrics.items()})
        earlier.unlink(missing_ok=True)
        # Not needed by finished work, and three times the size of the model.
        shutil.rmtree(place / "checkpoints", ignore_errors=True)

    on_first(finish)
    return metrics


def step_seconds(place: pathlib.Path, run: Run, num_steps: int | None = None) -> float:
    """Return the seconds of a run's first training steps, without compilations and evaluations; None counts all.

    It is the sum over the stages of the median time of a step, which a few slow steps do not change. A stage that
    was never timed takes the median of all steps.
    """
    timing = place / "timing.jsonl"
    tokens = {r["step"]: r["tokens"] for r in read_jsonl(place / "metrics.jsonl") if "tokens" in r}
    speeds = read_jsonl(timing) if timing.is_file() else []
    times: dict[int, list[float]] = {}
    for record in speeds:
        step = record["step"]
        if step in tokens and step - 1 in tokens:
            stage = 0 if run.changes is None else run.changes.stages.index(step - 1)
            seconds = (tokens[step] - tokens[step - 1]) / record["tokens_per_second"]
            times.setdefault(stage, []).append(seconds)
    if not times:
        return float("nan")
    median = float(np.median(np.concatenate(list(times.values()))))
    count = run.num_steps if num_steps is None else num_steps
    if run.changes is None:
        return count * median
    stages = run.changes.stages
    ends = [*stages.starts[1:], count]
    return sum(
        max(0, min(end, count) - start) * float(np.median(times.get(stage, [median])))
        for stage, (start, end) in enumerate(zip(stages.starts, ends, strict=True))
    )


def _read(path: pathlib.Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    return {name: float("nan") if value is None else value for name, value in values.items()}


def _model(place: pathlib.Path) -> Checkpoints:
    return Checkpoints(place / "model", keep=1, asynchronous=False)
