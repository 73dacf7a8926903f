"""Curricula as DeepSpeed's JSON configuration describes them.

Both blocks are read: ``data_efficiency``, and the older ``curriculum_learning`` at the top level. What is unknown,
missing or contradictory is an error, where DeepSpeed passes over it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from effscale.curriculum.deepspeed_index import ranking_from_deepspeed
from effscale.curriculum.pools import Difficulty
from effscale.curriculum.ranking import Ranking
from effscale.curriculum.sequence_length import Mode, SequenceLengthCurriculum
from effscale.models.validation import did_you_mean
from effscale.training import CustomPacing, DiscretePacing, LinearPacing, Pacing, RootPacing

Block = Mapping[str, Any]
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
"""Metrics that DeepSpeed's examples know by name, and shape batches by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSpeedCurriculum:
    """What a configuration asks for.

    Attributes:
        difficulties: For ``curriculum_rows``; empty if the order of samples is not touched.
        sequence_length: For the training step, or None. DeepSpeed's BERT example rounds its lengths up to multiples of 8:
            ``dataclasses.replace(sequence_length, multiple_of=8)``.
        seed: For ``curriculum_rows``.
        num_epochs: The run has ``num_epochs * len(rows) // batch_size`` steps in all.
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
    """Reads the curricula of a DeepSpeed configuration.

    A curriculum is on if its own ``enabled`` says so, as in DeepSpeed. The switches above it, which DeepSpeed does not
    consult, may be left out; one that says otherwise is an error. Metrics called ``seqlen_truncate`` and
    ``seqlen_reshape`` become the sequence-length curriculum. Of the others, those with
    ``clustering_type="single_cluster"`` leave the order of samples alone, whatever their name.

    ``data_cluster_path`` and ``num_workers`` have no counterpart: nothing is written, and reading ahead is safe.
    ``data_routing`` (random-LTD) is not looked at.

    Args:
        config: The whole configuration, from ``json.load``.
        rankings: Samples by difficulty for metrics that need them, by name; for the others, the files under
            ``index_to_sample_path`` and ``index_to_metric_path`` are read.
        functions: The schedules of metrics with ``schedule_type="custom"``, by name; ``seqlen`` is the older block's.

    Raises:
        ValueError: A key is unknown or missing, a value is out of range, or the configuration has no such block.
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
    if older is not None and _enabled(older, "curriculum_learning"):
        if found.sequence_length is not None:
            raise ValueError(
                "curriculum_learning and data_efficiency both ask for a sequence-length curriculum; keep one"
            )
        found = dataclasses.replace(found, sequence_length=_older(older, functions.get("seqlen")))
    return found


def pacing_from_deepspeed(
    config: Block, *, function: Callable[[int], int] | None = None, name: str = "metric"
) -> Pacing:
    """The pacing function of a metric's block, or of the older ``curriculum_learning``.

    It counts steps from 1. Values are DeepSpeed's but in two places: where those, rounded down to a multiple of
    ``difficulty_step``, fall below ``min_difficulty``, ours do not; and from ``total_curriculum_step`` on ours are
    ``max_difficulty``, which DeepSpeed reaches later where it is no multiple of ``difficulty_step``. With
    ``fixed_discrete`` the first and last ``difficulty`` must be ``min_difficulty`` and ``max_difficulty``, and with
    ``custom`` a ``total_curriculum_step`` says when the function has got there.

    Args:
        config: The block; only the keys of its schedule are looked at.
        function: The schedule of ``custom``, from the step to a difficulty.
        name: What errors call the block.

    Raises:
        ValueError: A key is unknown or missing, or a value is out of range.

    Example:
        >>> pacing = pacing_from_deepspeed({
        ...     "min_difficulty": 2, "max_difficulty": 10, "schedule_type": "fixed_linear",
        ...     "schedule_config": {"total_curriculum_step": 8, "difficulty_step": 2}})
        >>> [pacing(step) for step in range(1, 11)]
        [2, 4, 4, 6, 6, 8, 8, 10, 10, 10]
    """
    _keys(config, name, required=PACING, optional=config)
    kind, where = config["schedule_type"], f"{name}.schedule_config"
    if kind not in SCHEDULES:
        raise ValueError(f"{name}.schedule_type={kind!r}: {did_you_mean(str(kind), SCHEDULES)}")
    schedule = config["schedule_config"]
    _keys(schedule, where, required=SCHEDULES[kind])
    low, high = (_integer(config, key, name) for key in ("min_difficulty", "max_difficulty"))
    if kind == "fixed_discrete":
        difficulty, max_step = (_integers(schedule, key, where) for key in SCHEDULES[kind])
        if not difficulty or (difficulty[0], difficulty[-1]) != (low, high):
            raise ValueError(
                f"{where}.difficulty={list(difficulty)}: must go from min_difficulty={low} to max_difficulty={high}"
            )
        return DiscretePacing(difficulty=difficulty, max_step=max_step)
    total = _integer(schedule, "total_curriculum_step", where)
    if kind == "custom":
        if function is None:
            raise ValueError(
                f"{name}.schedule_type='custom': needs a function from steps to difficulties"
            )
        return CustomPacing(function=function, min_difficulty=low, max_difficulty=high, total=total)
    step = _integer(schedule, "difficulty_step", where)
    if kind == "fixed_linear":
        return LinearPacing(
            min_difficulty=low, max_difficulty=high, total=total, difficulty_step=step
        )
    return RootPacing(
        min_difficulty=low,
        max_difficulty=high,
        total=total,
        difficulty_step=step,
        root_degree=_integer(schedule, "root_degree", where),
    )


def _data_efficiency(
    block: Block, rankings: Mapping[str, Ranking], functions: Functions
) -> DeepSpeedCurriculum:
    outer, middle = "data_efficiency", "data_efficiency.data_sampling"
    inner = f"{middle}.curriculum_learning"
    _keys(block, outer, optional=("enabled", "seed", "data_sampling", "data_routing"))
    sampling = block.get("data_sampling", {})
    known = ("enabled", "num_epochs", "num_workers", "pin_memory", "curriculum_learning")
    _keys(sampling, middle, optional=known)
    learning = sampling.get("curriculum_learning")
    if learning is None or not _enabled(learning, inner):
        return DeepSpeedCurriculum()
    for where, above in ((outer, block), (middle, sampling)):
        if not above.get("enabled", True):
            raise ValueError(
                f"{where}.enabled is false and {inner}.enabled is true, by which DeepSpeed goes; let both say the same"
            )
    _keys(
        learning, inner, required=("enabled", "curriculum_metrics"), optional=("data_cluster_path",)
    )
    difficulties, lengths = _metrics(
        learning["curriculum_metrics"], f"{inner}.curriculum_metrics", rankings, functions
    )
    return DeepSpeedCurriculum(
        difficulties=difficulties,
        sequence_length=lengths,
        seed=_integer({"seed": 1234, **block}, "seed", outer),
        num_epochs=_integer({"num_epochs": 1000, **sampling}, "num_epochs", middle),
    )


def _metrics(
    metrics: Block, where: str, rankings: Mapping[str, Ranking], functions: Functions
) -> tuple[dict[str, Difficulty], SequenceLengthCurriculum | None]:
    _keys(metrics, where, optional=metrics)
    _keys(rankings, "rankings", optional=metrics)
    difficulties, lengths = {}, {}
    for name, metric in metrics.items():
        place = f"{where}.{name}"
        _keys(metric, place, required=METRIC, optional=PATHS)
        pacing = pacing_from_deepspeed(metric, function=functions.get(name), name=place)
        if name in LENGTHS:
            lengths[name] = SequenceLengthCurriculum(pacing=pacing, mode=LENGTHS[name])
        else:
            difficulties[name] = _difficulty(metric, pacing, rankings.get(name), place)
    if len(lengths) > 1:
        raise ValueError(f"{where}: {' and '.join(lengths)} exclude each other; keep one")
    return difficulties, next(iter(lengths.values()), None)


def _difficulty(metric: Block, pacing: Pacing, ranking: Ranking | None, where: str) -> Difficulty:
    ordered = metric["clustering_type"] != "single_cluster"
    if ordered and ranking is None:
        by_value = metric["difficulty_type"] == "value"
        paths = PATHS if by_value else PATHS[:1]
        _keys(metric, where, required=(*METRIC, *paths), optional=PATHS)
        ranking = ranking_from_deepspeed(*(metric[path] for path in paths))
    return Difficulty(
        ranking=ranking,
        pacing=pacing,
        difficulty_type=metric["difficulty_type"],
        clustering_type=metric["clustering_type"],
    )


def _older(block: Block, function: Callable[[int], int] | None) -> SequenceLengthCurriculum:
    where = "curriculum_learning"
    _keys(block, where, required=("enabled", "curriculum_type", *PACING))
    if block["curriculum_type"] != "seqlen":
        raise ValueError(
            f"{where}.curriculum_type={block['curriculum_type']!r}: must be 'seqlen', the only one there was"
        )
    return SequenceLengthCurriculum(
        pacing=pacing_from_deepspeed(block, function=function, name=where)
    )


def _enabled(block: Block, where: str) -> bool:
    _keys(block, where, required=("enabled",), optional=block)
    if not isinstance(block["enabled"], bool):
        raise ValueError(f"{where}.enabled={block['enabled']!r}: must be true or false")
    return block["enabled"]


def _keys(
    block: Any, where: str, *, required: Iterable[str] = (), optional: Iterable[str] = ()
) -> None:
    if not isinstance(block, Mapping):
        raise ValueError(f"{where}={block!r}: must be an object of keys and values")
    known = [*required, *optional]
    for key in block:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}: {did_you_mean(str(key), known)}")
    if missing := [key for key in required if key not in block]:
        raise ValueError(f"{where}: needs {', '.join(missing)}")


def _integer(block: Block, key: str, where: str) -> int:
    return _whole(block[key], f"{where}.{key}")


def _integers(block: Block, key: str, where: str) -> tuple[int, ...]:
    if not isinstance(block[key], list | tuple):
        raise ValueError(f"{where}.{key}={block[key]!r}: must be a list")
    return tuple(_whole(value, f"{where}.{key}") for value in block[key])


def _whole(value: Any, where: str) -> int:
    """JSON tells no integers from other numbers, and 1e5 is read as a float."""
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not is_whole:
        raise ValueError(f"{where}={value!r}: must be a whole number")
    return int(value)
