"""Curricula from DeepSpeed's JSON configuration.

Both forms are read: ``data_efficiency``, and the older ``curriculum_learning`` at the top level. Unknown, missing
or contradictory settings raise an error, where DeepSpeed ignores them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

from effscale.curriculum.lengths import Mode, SequenceLengthCurriculum
from effscale.curriculum.pools import Difficulty
from effscale.curriculum.ranking import Ranking
from effscale.interop.deepspeed.difficulty_index import ranking_from_deepspeed
from effscale.interop.deepspeed.settings import (
    Block,
    check_keys,
    part_of_data_efficiency,
    switch,
    whole_number,
    whole_numbers,
)
from effscale.options import did_you_mean
from effscale.training import CustomPacing, DiscretePacing, LinearPacing, Pacing, RootPacing

Functions = Mapping[str, Callable[[int], int]]

SCHEDULES = {
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_discrete": ("difficulty", "max_step"),
    "custom": ("total_curriculum_step",),
}
PACING = ("min_difficulty", "max_difficulty", "schedule_type", "schedule_config")
METRIC = ("difficulty_type", "clustering_type", *PACING)
PATHS = ("index_to_sample_path", "index_to_metric_path")
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
    if older is not None and switch(older, "curriculum_learning"):
        if found.sequence_length is not None:
            raise ValueError(
                "curriculum_learning and data_efficiency both define a sequence-length curriculum. Keep one of them."
            )
        found = dataclasses.replace(found, sequence_length=_older(older, functions.get("seqlen")))
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
    check_keys(config, name, required=PACING, optional=config)
    kind, where = config["schedule_type"], f"{name}.schedule_config"
    if kind not in SCHEDULES:
        raise ValueError(
            f"{name}.schedule_type must be one of {', '.join(SCHEDULES)}, got {kind!r}: {did_you_mean(str(kind), SCHEDULES)}"
        )
    schedule = config["schedule_config"]
    check_keys(schedule, where, required=SCHEDULES[kind])
    low, high = (
        whole_number(config[key], f"{name}.{key}") for key in ("min_difficulty", "max_difficulty")
    )
    if kind == "fixed_discrete":
        difficulty, max_step = (
            whole_numbers(schedule[key], f"{where}.{key}") for key in SCHEDULES[kind]
        )
        if not difficulty or (difficulty[0], difficulty[-1]) != (low, high):
            raise ValueError(
                f"{where}.difficulty must go from min_difficulty={low} to max_difficulty={high}, got {list(difficulty)}"
            )
        return DiscretePacing(difficulty=difficulty, max_step=max_step)
    total = whole_number(schedule["total_curriculum_step"], f"{where}.total_curriculum_step")
    if kind == "custom":
        if function is None:
            raise ValueError(
                f"{name}.schedule_type='custom' needs a function from steps to difficulties"
            )
        return CustomPacing(
            function=functools.update_wrapper(functools.partial(_from_one, function), function),
            min_difficulty=low,
            max_difficulty=high,
            total=total,
        )
    step = whole_number(schedule["difficulty_step"], f"{where}.difficulty_step")
    if kind == "fixed_linear":
        return LinearPacing(
            min_difficulty=low, max_difficulty=high, total=total, difficulty_step=step
        )
    return RootPacing(
        min_difficulty=low,
        max_difficulty=high,
        total=total,
        difficulty_step=step,
        root_degree=whole_number(schedule["root_degree"], f"{where}.root_degree"),
    )


def _from_one(function: Callable[[int], int], step: int) -> int:
    """Call a function that counts steps from 1, like DeepSpeed's, for a pacing that starts at 0."""
    return function(max(step, 1))


def _data_efficiency(
    block: Block, rankings: Mapping[str, Ranking], functions: Functions
) -> DeepSpeedCurriculum:
    part = part_of_data_efficiency(
        block, "data_sampling", "curriculum_learning", "num_epochs", "num_workers", "pin_memory"
    )
    if part is None:
        return DeepSpeedCurriculum()
    learning, inner, sampling = part
    check_keys(
        learning, inner, required=("enabled", "curriculum_metrics"), optional=("data_cluster_path",)
    )
    difficulties, lengths = _metrics(
        learning["curriculum_metrics"], f"{inner}.curriculum_metrics", rankings, functions
    )
    return DeepSpeedCurriculum(
        difficulties=difficulties,
        sequence_length=lengths,
        seed=whole_number(block.get("seed", 1234), "data_efficiency.seed"),
        num_epochs=whole_number(
            sampling.get("num_epochs", 1000), "data_efficiency.data_sampling.num_epochs"
        ),
    )


def _metrics(
    metrics: Block, where: str, rankings: Mapping[str, Ranking], functions: Functions
) -> tuple[dict[str, Difficulty], SequenceLengthCurriculum | None]:
    check_keys(metrics, where, optional=metrics)
    check_keys(rankings, "rankings", optional=metrics)
    difficulties, lengths = {}, {}
    for name, metric in metrics.items():
        place = f"{where}.{name}"
        check_keys(metric, place, required=METRIC, optional=PATHS)
        pacing = pacing_from_deepspeed(metric, function=functions.get(name), name=place)
        if name in LENGTHS:
            if metric["clustering_type"] != "single_cluster":
                raise ValueError(
                    f"{place}.clustering_type must be 'single_cluster', as {name} shapes batches and does not order samples, "
                    f"got {metric['clustering_type']!r}. To order samples, add a metric with a different name."
                )
            lengths[name] = SequenceLengthCurriculum(pacing=pacing, mode=LENGTHS[name])
        else:
            difficulties[name] = _difficulty(metric, pacing, rankings.get(name), place)
    if len(lengths) > 1:
        raise ValueError(f"{where}: {' and '.join(lengths)} exclude each other. Keep one of them.")
    return difficulties, next(iter(lengths.values()), None)


def _difficulty(metric: Block, pacing: Pacing, ranking: Ranking | None, where: str) -> Difficulty:
    ordered = metric["clustering_type"] != "single_cluster"
    if ordered and ranking is None:
        by_value = metric["difficulty_type"] == "value"
        paths = PATHS if by_value else PATHS[:1]
        check_keys(metric, where, required=(*METRIC, *paths), optional=PATHS)
        ranking = ranking_from_deepspeed(*(metric[path] for path in paths))
    return Difficulty(
        ranking=ranking,
        pacing=pacing,
        difficulty_type=metric["difficulty_type"],
        clustering_type=metric["clustering_type"],
    )


def _older(block: Block, function: Callable[[int], int] | None) -> SequenceLengthCurriculum:
    where = "curriculum_learning"
    check_keys(block, where, required=("enabled", "curriculum_type", *PACING))
    if block["curriculum_type"] != "seqlen":
        raise ValueError(
            f"{where}.curriculum_type must be 'seqlen', the only type, got {block['curriculum_type']!r}"
        )
    return SequenceLengthCurriculum(
        pacing=pacing_from_deepspeed(block, function=function, name=where)
    )
