"""Curricula from DeepSpeed's JSON configuration.

Both forms are read: ``data_efficiency``, and the older ``curriculum_learning`` at the top level. Unknown, missing
or contradictory settings raise an error, where DeepSpeed ignores them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

from effscale.curriculum.lengths import Mode, SequenceLengthCurriculum
from effscale.curriculum.pools import Difficulty
from effscale.curriculum.ranking import Ranking
from effscale.interop.deepspeed.difficulty_index import ranking_from_deepspeed
from effscale.interop.deepspeed.settings import (
    SWITCH,
    Block,
    Key,
    is_enabled,
    part_of_data_efficiency,
    read,
)
from effscale.options import did_you_mean
from effscale.training import CustomPacing, DiscretePacing, LinearPacing, RootPacing
from effscale.training.pacing import Pacing

Functions = Mapping[str, Callable[[int], int]]

TOTAL = {"total_curriculum_step": Key(int)}
LINEAR = TOTAL | {"difficulty_step": Key(int)}
SCHEDULES = {
    "fixed_linear": LINEAR,
    "fixed_root": LINEAR | {"root_degree": Key(int)},
    "fixed_discrete": {"difficulty": Key(tuple[int, ...]), "max_step": Key(tuple[int, ...])},
    "custom": TOTAL,
}
PACING = {
    "min_difficulty": Key(int),
    "max_difficulty": Key(int),
    "schedule_type": Key(Literal["fixed_linear", "fixed_root", "fixed_discrete", "custom"]),
    "schedule_config": Key(Any),
}
PATHS = ("index_to_sample_path", "index_to_metric_path")
METRIC = {
    "difficulty_type": Key(Any),
    "clustering_type": Key(Any),
    **PACING,
    **dict.fromkeys(PATHS, Key(Any, None)),
}
LEARNING = {
    "enabled": SWITCH,
    "curriculum_metrics": Key(Any),
    "data_cluster_path": Key(Any, None),
}
OLDER = {"enabled": SWITCH, "curriculum_type": Key(Literal["seqlen"]), **PACING}
LENGTHS: Mapping[str, Mode] = {"seqlen_truncate": "truncate", "seqlen_reshape": "reshape"}
"""Metrics whose names DeepSpeed's examples interpret as ways to shape batches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSpeedCurriculum:
    """The curricula of a configuration.

    Attributes:
        difficulties: The argument of ``curriculum_rows``; empty if the order of samples does not change.
        sequence_length: The curriculum for the training step, or None. DeepSpeed's BERT example rounds its lengths up to
            multiples of 8: ``dataclasses.replace(sequence_length, multiple_of=8)``.
        seed: The seed for ``curriculum_rows``.
        num_epochs: The number of epochs; the run has ``num_epochs * len(rows) // batch_size`` steps in total.
    """

    difficulties: Mapping[str, Difficulty] = dataclasses.field(default_factory=dict)
    sequence_length: SequenceLengthCurriculum | None = None
    seed: int = 1234
    num_epochs: int = 1000


def curriculum_from_deepspeed(
    config: Block,
    *,
    rankings: Mapping[str, Ranking] | None = None,
    functions: Functions | None = None,
) -> DeepSpeedCurriculum:
    """Read the curricula of a DeepSpeed configuration.

    As in DeepSpeed, a curriculum is active if its own ``enabled`` is true. DeepSpeed ignores the switches above it. They can be
    left out; one that contradicts it raises an error.

    Metrics named ``seqlen_truncate`` and ``seqlen_reshape`` become the sequence-length curriculum, and must have
    ``clustering_type="single_cluster"``. To order samples as well, add a second metric with a different name. Other metrics with
    ``clustering_type="single_cluster"`` do not change the order of samples.

    ``data_cluster_path`` and ``num_workers`` have no equivalent: nothing is written, and reading ahead is safe.
    ``data_routing`` is read by ``random_ltd_from_deepspeed``.

    Args:
        config: The whole configuration, from ``json.load``.
        rankings: The rankings of metrics by name. For metrics that need one and are not listed, the files at
            ``index_to_sample_path`` and ``index_to_metric_path`` are read.
        functions: The schedules of metrics with ``schedule_type="custom"``, by name; ``seqlen`` is that of the older form.

    Raises:
        ValueError: A key is unknown or missing, a value is out of range, or the configuration has neither block.
        FileNotFoundError: An index is missing.
        CorruptIndexedDataError: An index is damaged.

    Example:
        >>> config = {"curriculum_learning": {
        ...     "enabled": True, "curriculum_type": "seqlen", "min_difficulty": 8, "max_difficulty": 1024,
        ...     "schedule_type": "fixed_linear",
        ...     "schedule_config": {"total_curriculum_step": 15_000, "difficulty_step": 8}}}
        >>> curriculum = curriculum_from_deepspeed(config)
        >>> curriculum.sequence_length.pacing(7500)
        512
    """
    blocks = ("data_efficiency", "curriculum_learning")
    if not any(name in config for name in blocks):
        hints = "; ".join(f"{name}: {did_you_mean(name, config)}" for name in blocks if config)
        raise ValueError(f"the configuration has neither {' nor '.join(blocks)} ({hints})")
    functions = functions or {}
    found = DeepSpeedCurriculum()
    if "data_efficiency" in config:
        found = _data_efficiency(config["data_efficiency"], rankings or {}, functions)
    older = config.get("curriculum_learning")
    if older is not None and is_enabled(older, "curriculum_learning"):
        if found.sequence_length is not None:
            raise ValueError(
                "curriculum_learning and data_efficiency both define a sequence-length curriculum. Keep one of them."
            )
        found = dataclasses.replace(found, sequence_length=_older(older, functions))
    return found


def pacing_from_deepspeed(
    config: Block, *, function: Callable[[int], int] | None = None, name: str = "metric"
) -> Pacing:
    """Return the pacing function of a metric, or of the older ``curriculum_learning``.

    It counts steps from 1. Values equal DeepSpeed's, with two exceptions. They never fall below ``min_difficulty``, as
    DeepSpeed's can when they are rounded down to a multiple of ``difficulty_step``. And they are ``max_difficulty`` from
    ``total_curriculum_step`` on, which DeepSpeed reaches later if it is not a multiple of ``difficulty_step``.

    With ``fixed_discrete`` the first and last ``difficulty`` must be ``min_difficulty`` and ``max_difficulty``. With
    ``custom``, ``total_curriculum_step`` is the step at which the function reaches the maximum. The function is never called with
    a step below 1.

    Args:
        config: The block of the metric; only the keys of its schedule are read.
        function: The schedule for ``custom``, from the step to a difficulty.
        name: The name of the block in errors.

    Raises:
        ValueError: A key is unknown or missing, or a value is out of range.

    Example:
        >>> pacing = pacing_from_deepspeed({
        ...     "min_difficulty": 2, "max_difficulty": 10, "schedule_type": "fixed_linear",
        ...     "schedule_config": {"total_curriculum_step": 8, "difficulty_step": 2}})
        >>> [pacing(step) for step in range(1, 11)]
        [2, 4, 4, 6, 6, 8, 8, 10, 10, 10]
    """
    values, where = read(config, name, PACING, others=True), f"{name}.schedule_config"
    kind, low, high = (values[key] for key in ("schedule_type", "min_difficulty", "max_difficulty"))
    schedule = read(values["schedule_config"], where, SCHEDULES[kind])
    if kind == "fixed_discrete":
        difficulty = schedule["difficulty"]
        if not difficulty or (difficulty[0], difficulty[-1]) != (low, high):
            raise ValueError(
                f"{where}.difficulty must go from min_difficulty={low} to max_difficulty={high}, got {list(difficulty)}"
            )
        return DiscretePacing(**schedule)
    common = {
        "min_difficulty": low,
        "max_difficulty": high,
        "total": schedule.pop("total_curriculum_step"),
    }
    if kind != "custom":
        return (LinearPacing if kind == "fixed_linear" else RootPacing)(**common, **schedule)
    if function is None:
        raise ValueError(
            f"{name}.schedule_type='custom' needs a function from steps to difficulties"
        )
    ours = functools.update_wrapper(functools.partial(_from_one, function), function)
    return CustomPacing(function=ours, **common)


def _from_one(function: Callable[[int], int], step: int) -> int:
    """Call a function that counts steps from 1, like DeepSpeed's, for a pacing that starts at 0."""
    return function(max(step, 1))


def _data_efficiency(
    block: Block, rankings: Mapping[str, Ranking], functions: Functions
) -> DeepSpeedCurriculum:
    part = part_of_data_efficiency(block, "data_sampling", "curriculum_learning")
    if part is None:
        return DeepSpeedCurriculum()
    learning, where, values = part
    metrics = read(learning, where, LEARNING)["curriculum_metrics"]
    difficulties, lengths = _metrics(metrics, f"{where}.curriculum_metrics", rankings, functions)
    return DeepSpeedCurriculum(
        difficulties=difficulties,
        sequence_length=lengths,
        seed=values["seed"],
        num_epochs=values["data_sampling"]["num_epochs"],
    )


def _metrics(
    metrics: Block, where: str, rankings: Mapping[str, Ranking], functions: Functions
) -> tuple[dict[str, Difficulty], SequenceLengthCurriculum | None]:
    read(metrics, where, {}, others=True)
    read(rankings, "rankings", dict.fromkeys(metrics, Key(Any, None)))
    difficulties, lengths = {}, {}
    for name, metric in metrics.items():
        place = f"{where}.{name}"
        values = read(metric, place, METRIC)
        pacing = pacing_from_deepspeed(metric, function=functions.get(name), name=place)
        clustering = values["clustering_type"]
        if name in LENGTHS:
            if clustering != "single_cluster":
                raise ValueError(
                    f"{place}.clustering_type must be 'single_cluster', as {name} shapes batches and does not order samples, "
                    f"got {clustering!r}. To order samples, add a metric with a different name."
                )
            lengths[name] = SequenceLengthCurriculum(pacing=pacing, mode=LENGTHS[name])
            continue
        by, ranking = values["difficulty_type"], rankings.get(name)
        if clustering != "single_cluster" and ranking is None:
            paths = PATHS if by == "value" else PATHS[:1]
            needed = read(metric, place, dict.fromkeys(paths, Key(Any)), others=True)
            ranking = ranking_from_deepspeed(*needed.values())
        difficulties[name] = Difficulty(
            ranking=ranking, pacing=pacing, difficulty_type=by, clustering_type=clustering
        )
    if len(lengths) > 1:
        raise ValueError(f"{where}: {' and '.join(lengths)} exclude each other. Keep one of them.")
    return difficulties, next(iter(lengths.values()), None)


def _older(block: Block, functions: Functions) -> SequenceLengthCurriculum:
    where = "curriculum_learning"
    read(block, where, OLDER)
    return SequenceLengthCurriculum(
        pacing=pacing_from_deepspeed(block, function=functions.get("seqlen"), name=where)
    )
