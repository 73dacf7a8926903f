"""One arm of a study with one seed: trained once, resumed after a stop."""

import dataclasses
import pathlib
import sys
from typing import Any

import jax

from effscale.parallel.placement import placed
from effscale.run import Run
from effscale.study.search import Point
from effscale.training import Checkpoints
from effscale.training.metrics import step_seconds
from effscale.training.run_folder import once


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
            stages = None if run.changes is None else run.changes.stages
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
                "step_seconds": step_seconds(place, run.num_steps, stages),
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


def _model(place: pathlib.Path) -> Checkpoints:
    return Checkpoints(place / "model", keep=1, asynchronous=False)
