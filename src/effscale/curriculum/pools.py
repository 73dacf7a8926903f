"""The pool of samples available at each step."""

import bisect
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from effscale.curriculum.order import Clusters, GrowingOrder, count_stages
from effscale.curriculum.ranking import Ranking, blocks, check_ranking, raise_stages
from effscale.options import Options, check
from effscale.training.pacing import Pacing
from effscale.training.stages import Stages, merge, stages


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Difficulty(Options):
    """A difficulty metric with its schedule.

    The names are those of DeepSpeed's configuration.
    """

    ranking: Ranking | None = None
    """The samples from the easiest to the hardest; not needed with ``"single_cluster"``."""
    pacing: Pacing
    """The pacing of the difficulty, by training steps counted from 1, or by samples or tokens consumed before the step."""
    difficulty_type: Literal["value", "percentile"] = "value"
    """How to interpret difficulty ``d``. ``"value"`` allows the samples with a value of at most ``d``, and
    ``"percentile"`` the first ``d`` of ``max_difficulty`` equal parts of the ranking; the last part includes the
    remainder."""
    clustering_type: Literal["schedule_based", "single_cluster"] = "schedule_based"
    """Whether to restrict the pool of samples. ``"single_cluster"`` does not: for a difficulty that is applied to the
    rows themselves, such as a length."""

    def __post_init__(self):
        super().__post_init__()
        if self.clustering_type == "single_cluster":
            return
        needed = 'a ranking of the samples, unless clustering_type="single_cluster"'
        check(self, self.ranking is not None, "ranking", needed)
        assert self.ranking is not None
        check_ranking(self.ranking)
        n, parts = len(self.ranking.samples), self.greatest
        if self.difficulty_type == "percentile" and n < parts:
            raise ValueError(
                f"Difficulty.ranking must have at least {parts} samples for the {parts} percentiles of the pacing, got {n}. "
                f"Use a max_difficulty of at most {n}."
            )

    @property
    def greatest(self) -> int:
        """The final difficulty."""
        return self.pacing(self.pacing.end)

    def num_allowed(self, difficulty: int) -> int:
        """Return the number of samples, from the start of the ranking, that are allowed at a difficulty."""
        assert self.ranking is not None
        samples, values = self.ranking
        if self.difficulty_type == "value":
            # NumPy's search would first convert all values if their type differs.
            return bisect.bisect_right(values, difficulty, key=lambda value: value.item())
        if difficulty >= self.greatest:
            return len(samples)
        return len(samples) // self.greatest * difficulty


def growing_order(
    difficulties: Mapping[str, Difficulty],
    num_rows: int,
    batch_size: int,
    seed: int,
    tokens_per_row: int | None,
) -> GrowingOrder:
    """Return the order of a curriculum; see ``effscale.curriculum.curriculum_rows``."""
    limits = {
        name: difficulty
        for name, difficulty in difficulties.items()
        if difficulty.clustering_type == "schedule_based"
    }
    merged = merge(
        *(
            _stages(name, difficulty, num_rows, batch_size, tokens_per_row)
            for name, difficulty in limits.items()
        )
    )
    # For each sample the first stage at which it is allowed, or the number of stages if it never is.
    stage = np.zeros(num_rows, np.min_scalar_type(len(merged.values)))
    for i, difficulty in enumerate(limits.values()):
        assert difficulty.ranking is not None
        allowed = [difficulty.num_allowed(values[i]) for values in merged.values]
        raise_stages(stage, difficulty.ranking.samples, [0, *allowed])
    sizes = count_stages(stage, len(merged.values) + 1)
    if not sizes[0]:
        raise ValueError(_nothing_at_first(limits, merged.values[0]))
    if sizes[-1]:
        reach = ", ".join(f"{name} {limit.greatest}" for name, limit in limits.items())
        warnings.warn(
            f"{sizes[-1]} of {num_rows} samples are never drawn, as they are harder than the maximum difficulty ({reach})",
            stacklevel=3,
        )
    # Skip stages at which nothing new becomes available.
    opens = np.flatnonzero(sizes[:-1])
    number = np.full(len(sizes), len(opens), stage.dtype)
    number[opens] = np.arange(len(opens))
    for block in blocks(num_rows):
        stage[block] = number[stage[block]]
    clusters = Clusters(stage, len(opens), seed)
    return GrowingOrder(clusters, [merged.starts[k] * batch_size for k in opens])


def _stages(
    name: str, difficulty: Difficulty, num_rows: int, batch_size: int, tokens_per_row: int | None
) -> Stages[int]:
    assert difficulty.ranking is not None
    num_samples, clock = len(difficulty.ranking.samples), difficulty.pacing.clock
    if num_samples != num_rows:
        raise ValueError(
            f"the ranking of {name!r} must have one sample for each of the {num_rows} rows, got {num_samples}. "
            "Rank the rows that you train on."
        )
    if clock == "tokens" and tokens_per_row is None:
        raise ValueError(f"the pacing of {name!r} counts tokens, so it needs tokens_per_row")
    consumed = batch_size * (tokens_per_row or 1) if clock == "tokens" else batch_size
    return stages(difficulty.pacing, cost=lambda _: consumed)


def _nothing_at_first(limits: Mapping[str, Difficulty], firsts: Sequence[int]) -> str:
    for (name, limit), first in zip(limits.items(), firsts, strict=True):
        assert limit.ranking is not None
        if not limit.num_allowed(first):
            least = 1 if limit.difficulty_type == "percentile" else limit.ranking.values[0]
            return (
                f"no sample is available at first: the pacing of {name!r} starts at {first}, and the smallest "
                f"{limit.difficulty_type} is {least}. Start at {least} or higher."
            )
    return (
        f"no sample is available at first: no sample is allowed by all of {', '.join(map(repr, limits))}. "
        "Start at greater difficulties."
    )
