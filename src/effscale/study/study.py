"""A study: arms, seeds, a search, and the table that remembers them."""

import concurrent.futures
import dataclasses
import gc
import math
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effscale.options import check, did_you_mean, is_integer
from effscale.run import Run
from effscale.study.plots import Plot
from effscale.study.search import Found, Point, Search
from effscale.study.table import Row, Table, rows_of
from effscale.study.trial import Trial
from effscale.training import TrainingDivergedError
from effscale.training.plotting import records_of
from effscale.training.run_folder import once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things that a study compares."""

    about: str
    """What it is, in tables and figures."""
    train: Run | Callable[[Trial], Mapping[str, Any]]
    """A run, or a function that trains a trial and returns its metrics."""
    against: str | None = None
    """The arm that it is compared with; None takes the baseline of the study."""
    needs: tuple[str, ...] = ()
    """Arms that must be trained before, such as a teacher."""
    start: Point | None = None
    """Where the search of its learning rate begins; None searches nothing."""
    point_of: str | None = None
    """The arm whose point it takes instead of a search of its own."""
    seeds: int | None = None
    """Number of its seeds, if it differs from that of the study."""

    @property
    def before(self) -> tuple[str, ...]:
        """The arms that must stand before it in the study."""
        return self.needs if self.point_of is None else (*self.needs, self.point_of)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of arms over seeds.

    Each arm is trained once with each seed. Arms with a ``start`` get a search first, by the same rule for all, with a
    seed of its own. All values go into one long table; intervals are those of Student's t distribution.

    Example:
        Any function that returns metrics can be an arm:

        >>> import tempfile
        >>> from effscale.study import Arm, Study
        >>> study = Study(name="coins", baseline="fair", metric="heads", arms={
        ...     "fair": Arm(about="a fair coin", train=lambda trial: {"heads": 0.5}),
        ...     "loaded": Arm(about="a loaded one", train=lambda trial: {"heads": 0.6 + 0.01 * trial.seed})})
        >>> results = study.train(tempfile.mkdtemp(), seeds=3)
        >>> results.table.difference("loaded", "fair", "heads").text(2, sign=True)
        '+0.11 [+0.09, +0.13]'
    """

    name: str
    """Name of the study."""
    arms: Mapping[str, Arm]
    """The arms by name; an arm that another needs stands before it."""
    baseline: str
    """The arm that the others are compared with."""
    metric: str = "val_loss"
    """The metric that is compared, and that the search minimizes."""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Digests of the data, for ``config.json``: a study is not resumed with other data."""
    search: Search = Search(points=1)
    """How the search goes; with one point there is none."""
    columns: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {
            "updates": "updates",
            "tokens": "tokens",
            "step_seconds": "seconds",
        }
    )
    """Further metrics in the table of arms, with their headings."""
    pairs: Sequence[tuple[str, str, str]] = ()
    """Further comparisons: an arm, the arm to subtract, and what is compared."""
    plots: Sequence[Plot] = ()
    """The figures."""
    figures: Callable[["Results"], Mapping[str, float | None]] | None = None
    """A function that computes further named figures for a page."""

    def __post_init__(self):
        names = list(self.arms)
        wanted = f"the name of an arm; {did_you_mean(self.baseline, names)}"
        check(self, self.baseline in names, "baseline", wanted)
        for name, arm in self.arms.items():
            for other in arm.before:
                if other not in names[: names.index(name)]:
                    raise ValueError(
                        f"Study.arms must have {other!r}, which {name!r} needs, before it, got {', '.join(names)}"
                    )

    def train(
        self,
        folder: str | os.PathLike[str],
        *,
        seeds: int = 3,
        jobs: int = 1,
        again: Callable[[], "Study"] | None = None,
    ) -> "Results":
        """Train what is missing in a folder.

        Args:
            folder: The folder; each trial has its own in it, ``<arm>/seed-<seed>``.
            seeds: Number of seeds, from 0.
            jobs: Number of processes, each pinned to its share of the cores, that the arms are divided over.
            again: With several jobs, a function that creates this study in another process; it must be defined in a module.

        Raises:
            StoppedBySignal: SIGTERM or Ctrl-C stopped a trial, which has been saved.
            ValueError: An option is out of range.
        """
        for option, value in {"seeds": seeds, "jobs": jobs}.items():
            if not is_integer(value) or value < 1:
                raise ValueError(f"{option} must be a whole number of at least 1, got {value!r}")
        self.search.check_apart(max(seeds, *(arm.seeds or 0 for arm in self.arms.values())))
        folder = pathlib.Path(folder)
        if jobs > 1:
            if again is None:
                raise ValueError(
                    f"again must be a function that creates the study, with jobs={jobs}"
                )
            _in_processes(again, folder, seeds, self.groups(), jobs)
        return self.train_arms(folder, seeds, list(self.arms))

    def train_arms(self, folder: pathlib.Path, seeds: int, names: Sequence[str]) -> "Results":
        """Train what is missing of some arms, in this process."""
        found: dict[str, Found] = {}
        rows: list[Row] = []
        for name in names:
            point = self._point(folder, name, found)
            for seed in range(self.arms[name].seeds or seeds):
                place = folder / name / f"seed-{seed}"
                trial = Trial(arm=name, seed=seed, place=place, study=folder, point=point)
                rows += rows_of(name, seed, self._once(trial))
            gc.collect()  # compiled programs of this arm; Linux limits the memory maps of a process
        return Results(study=self, folder=folder, table=Table(rows), found=found, seeds=seeds)

    def only(self, names: Sequence[str] | None) -> "Study":
        """Return the study with these arms, in its own order; None keeps all.

        Raises:
            ValueError: There is no such arm, or one needs another.
        """
        if names is None:
            return self
        for name in names:
            if name not in self.arms:
                raise ValueError(
                    f"arms must be arms of {self.name}, got {name!r}: {did_you_mean(name, self.arms)}"
                )
        arms = {name: arm for name, arm in self.arms.items() if name in names}
        baseline = self.baseline if self.baseline in arms else next(iter(arms), "")
        return dataclasses.replace(self, arms=arms, baseline=baseline)

    def against(self, name: str) -> str | None:
        """Return the arm that an arm is compared with; None for the baseline itself."""
        other = self.arms[name].against or self.baseline
        return None if other == name or other not in self.arms else other

    def groups(self) -> list[list[str]]:
        """Return the arms in groups, such that no arm needs one of another group."""
        groups: list[list[str]] = []
        for name, arm in self.arms.items():
            joined = [group for group in groups if set(group) & set(arm.before)]
            groups = [group for group in groups if group not in joined]
            groups.append([*(other for group in joined for other in group), name])
        return groups

    def _point(self, folder: pathlib.Path, name: str, found: dict[str, Found]) -> Point | None:
        arm = self.arms[name]
        if arm.point_of is not None:
            return self._point(folder, arm.point_of, found)
        if arm.start is None:
            return None

        def loss_of(point: Point) -> float:
            trial = Trial(
                arm=name,
                seed=self.search.seed,
                place=folder / "search" / name / point.name,
                study=folder,
                point=point,
                tuning=True,
            )
            loss = self._once(trial).get(self.metric, math.nan)
            return math.inf if math.isnan(loss) else loss

        if name not in found:
            found[name] = self.search.climb(arm.start, loss_of)
        return found[name].best

    def _once(self, trial: Trial) -> dict[str, Any]:
        train = self.arms[trial.arm].train

        def metrics() -> dict[str, Any]:
            try:
                return dict(trial.fit(train) if isinstance(train, Run) else train(trial))
            except TrainingDivergedError as error:  # a result; the other trials continue
                print(f"{trial.place} diverged at step {error.step}", file=sys.stderr)
                return {self.metric: math.nan, "diverged": 1}

        return once(trial.place, metrics, mark="trial.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """The results of a study.

    Attributes:
        study: The study.
        folder: Its folder.
        table: All values.
        found: The results of the searches by arm.
        seeds: Number of seeds.
    """

    study: Study
    folder: pathlib.Path
    table: Table
    found: Mapping[str, Found]
    seeds: int

    def records(self, arm: str, part: str = "") -> list[Any]:
        """Return the records of ``metrics.jsonl`` of an arm for each seed."""
        places = [self.folder / arm / f"seed-{seed}" / part for seed in range(self.seeds)]
        return [records_of(place) for place in places]


def _in_processes(
    again: Callable[[], Study],
    folder: pathlib.Path,
    seeds: int,
    groups: Sequence[Sequence[str]],
    jobs: int,
) -> None:
    """Train groups of arms in processes; the first that fails or is stopped ends the others, which save."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    context = multiprocessing.get_context("spawn")
    places = context.SimpleQueue()
    for job in range(jobs):
        places.put(cores[job::jobs])
    with concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_pin, initargs=(places,)
    ) as pool:
        work = [pool.submit(_train_group, again, folder, seeds, list(group)) for group in groups]
        for done in concurrent.futures.as_completed(work):
            try:
                done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _pin(places: Any) -> None:
    cores = places.get()
    if cores:
        os.sched_setaffinity(0, cores)


def _train_group(
    again: Callable[[], Study], folder: pathlib.Path, seeds: int, names: list[str]
) -> None:
    again().train_arms(folder, seeds, names)
