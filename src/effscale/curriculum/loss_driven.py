"""A curriculum that moves on as the training loss falls."""

import math
from typing import Any

import grain
import jax
import numpy as np

from effscale.curriculum.order import Clusters, next_draws
from effscale.curriculum.ranking import Ranking, check_ranking, raise_stages
from effscale.data.seeds import check_seed


class LossDrivenBatches(grain.IterDataset):
    r"""Batches from the easiest samples first, then from more and more as the model becomes competent.

    The competence is how much of the way from the first loss $L_1$ to a target the running mean $\bar L$ of the
    losses has gone, and the pool is that many percentiles of the ranking:

    $$d = d_0 + \lfloor c \, (d_1 - d_0) \rfloor, \quad c = \frac{L_1 - \bar L}{L_1 - L_\text{target}}$$

    with $c$ between 0 and 1. It never shrinks: harder samples may raise the loss again. Within the pool the order is
    that of `effscale.curriculum.sampler.curriculum_rows`. A target that the model does not reach leaves the hardest samples
    out for good, so choose one that it surely does, and look at ``difficulty`` of the iterator while it trains.

    The loss is reported to the iterator, so what it gives is not a function of the position; its state is in ``get_state``
    and ``set_state``, exactly. A loss is taken into account two batches later: so the host need not wait for the step that
    the device is working at, and a resumed run does what an uninterrupted one does. All processes draw the same if they
    report the same losses. To use it in `effscale.training.fit`::

        batches = iter(LossDrivenBatches(rows, ranking, batch_size=8, target_loss=3.0))

        def step_and_report(state, batch):
            state, metrics = step(state, batch)
            batches.report(metrics["loss"])
            return state, metrics

        fit(state, step_and_report, batches, num_steps=1000)

    It gives whole batches and reads nothing ahead, as the next batch depends on the losses; transform ``rows`` rather than the
    result, whose iterator would hide ``report``.

    Source: the competence follows Platanios et al., "Competence-based curriculum learning for neural machine translation",
    2019, where it is a function of the step.

    >>> from effscale.curriculum.ranking import rank
    >>> batches = iter(LossDrivenBatches(range(8), rank(np.arange(8)), batch_size=2, target_loss=1.0, max_difficulty=4))
    >>> for loss in (3.0, 2.0, 1.5, 0.5, 0.5, 0.4, 0.3):
    ...     print(next(batches).tolist(), batches.difficulty)
    ...     batches.report(loss)
    [1, 0] 1
    [0, 1] 1
    [1, 0] 1
    [1, 0] 1
    [1, 3] 2
    [2, 0] 2
    [5, 1] 3
    """

    def __init__(
        self,
        rows: Any,
        ranking: Ranking,
        *,
        batch_size: int,
        target_loss: float | int,
        min_difficulty: int = 1,
        max_difficulty: int = 100,
        window: int = 100,
        seed: int = 1234,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Prepares the batches.

        Args:
            rows: The samples by id, with a length; pytrees of arrays.
            ranking: The samples from the easiest to the hardest.
            batch_size: Rows in a global batch.
            target_loss: The mean loss at which all samples are available.
            min_difficulty: Percentiles that are available at first.
            max_difficulty: In how many percentiles the ranking is divided; the remainder is in the last one.
            window: The mean is over all losses until there are so many, then each new one has this share of it.
            seed: Decides the order.
            process_index: Which process this is; it gets a contiguous part of each batch, as in `effscale.data.batch_rows`.
            process_count: How many there are.

        Raises:
            ValueError: The ranking is none of these rows, or an argument is out of range.
        """
        super().__init__()
        check_ranking(ranking)
        num = len(ranking.samples)
        faults = [
            (num != len(rows), f"a ranking of {num} samples for {len(rows)} rows"),
            (not math.isfinite(target_loss), f"target_loss={target_loss}: it must be finite"),
            (
                not 1 <= min_difficulty <= max_difficulty <= num,
                f"min_difficulty={min_difficulty}, max_difficulty={max_difficulty}: they must rise from 1 to at most "
                f"the number of samples, {num}",
            ),
            (window < 1, f"window={window}: it must be at least 1"),
            (
                not 0 <= process_index < process_count,
                f"process_index={process_index}: it must be from 0 to process_count-1={process_count - 1}",
            ),
            (
                batch_size < 1 or batch_size % process_count != 0,
                f"batch_size={batch_size}: it must be a multiple of process_count={process_count}",
            ),
        ]
        check_seed(seed)
        for wrong, message in faults:
            if wrong:
                raise ValueError(message)
        self.rows, self.batch_size, self.window = rows, batch_size, window
        self.target_loss = float(target_loss)
        self.min_difficulty, self.max_difficulty = min_difficulty, max_difficulty
        local = batch_size // process_count
        self.local = slice(process_index * local, (process_index + 1) * local)
        num_clusters = max_difficulty - min_difficulty + 1
        part = num // max_difficulty
        stage = np.zeros(num, np.min_scalar_type(num_clusters))
        bounds = [0, *(part * difficulty for difficulty in range(min_difficulty, max_difficulty))]
        raise_stages(stage, ranking.samples, bounds)
        self.clusters = Clusters(stage, num_clusters, seed)

    def __iter__(self) -> "LossDrivenIterator":
        """A new iterator, from the start."""
        return LossDrivenIterator(self)


class LossDrivenIterator(grain.DatasetIterator):
    """The iterator of `LossDrivenBatches`.

    Attributes:
        difficulty: How many percentiles are available.
        mean: The running mean of the losses; None before there is one.
    """

    def __init__(self, batches: LossDrivenBatches):
        super().__init__()
        self._batches = batches
        self._step = self._num_losses = 0
        self._time = 0.0
        self._opened, self._drawn = [0.0], [0]
        self._reported: list[tuple[int, Any]] = []
        self._first: float | None = None
        self.mean: float | None = None
        self.difficulty = batches.min_difficulty

    def report(self, loss: Any) -> None:
        """Take the loss of the batch drawn last: a number or an array of one; it is not waited for. NaN is ignored."""
        self._reported.append((self._step, loss))

    def __next__(self) -> Any:
        batches = self._batches
        self._learn()
        opened, drawn = np.array(self._opened), np.array(self._drawn)
        cluster, draw, _ = next_draws(
            batches.clusters, opened, drawn, self._time, 0, batches.batch_size
        )
        self._drawn = (drawn + np.bincount(cluster, minlength=len(drawn))).tolist()
        self._time += batches.batch_size / int(batches.clusters.sizes[: len(drawn)].sum())
        self._step += 1
        samples = batches.clusters.sample(cluster, draw)[batches.local]
        rows = [batches.rows[int(sample)] for sample in samples]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

    def _learn(self) -> None:
        """Takes the losses of all batches but the last one into account."""
        batches = self._batches
        while self._reported and self._reported[0][0] < self._step:
            loss = float(self._reported.pop(0)[1])
            if not math.isfinite(loss):
                continue
            self._num_losses += 1
            if self._first is None or self.mean is None:
                self._first = self.mean = loss
            self.mean += (loss - self.mean) / min(self._num_losses, batches.window)
            target = batches.target_loss
            competence = 1.0
            if self.mean > target and self._first > target:
                competence = max(0.0, (self._first - self.mean) / (self._first - target))
            reach = batches.max_difficulty - batches.min_difficulty
            wanted = batches.min_difficulty + math.floor(competence * reach)
            while self.difficulty < wanted:
                self.difficulty += 1
                self._opened.append(self._time)
                self._drawn.append(0)

    def get_state(self) -> dict[str, Any]:
        """Plain numbers; waits for the losses reported."""
        self._reported = [(step, float(loss)) for step, loss in self._reported]
        return {
            "step": self._step,
            "time": self._time,
            "opened": list(self._opened),
            "drawn": list(self._drawn),
            "num_losses": self._num_losses,
            "first": self._first,
            "mean": self.mean,
            # JSON has no NaN.
            "reported": [list(pair) for pair in self._reported if math.isfinite(pair[1])],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken."""
        clusters = len(self._batches.clusters.sizes)
        if len(state["opened"]) > clusters:
            raise ValueError(
                f"the state has {len(state['opened'])} pools and this curriculum {clusters}: "
                "it is of another min_difficulty or max_difficulty"
            )
        self._step, self._time = state["step"], state["time"]
        self._opened, self._drawn = list(state["opened"]), list(state["drawn"])
        self._num_losses, self._first, self.mean = (
            state["num_losses"],
            state["first"],
            state["mean"],
        )
        self._reported = [(step, loss) for step, loss in state["reported"]]
        self.difficulty = self._batches.min_difficulty + len(self._opened) - 1
