"""A curriculum that advances as the training loss decreases."""

import math
from typing import Any

import grain
import jax
import numpy as np

from effscale.curriculum.order import Clusters, next_draws
from effscale.curriculum.ranking import Ranking, check_ranking, raise_stages
from effscale.data.seeds import check_seed


class LossDrivenBatches(grain.IterDataset):
    r"""Batches from the easiest samples first, then from a growing pool as the model becomes competent.

    The competence $c$ is the fraction of the way from the first loss $L_1$ to a target loss that the running mean $\bar L$
    of the losses has covered. The pool is the first $d$ of $d_1$ equal parts of the ranking, starting with $d_0$ parts:

    $$d = d_0 + \lfloor c \, (d_1 - d_0) \rfloor, \quad c = \frac{L_1 - \bar L}{L_1 - L_\text{target}}$$

    with $c$ clipped to $[0, 1]$. The pool never shrinks, even if harder samples raise the loss again. Within the pool the order is
    that of ``effscale.curriculum.curriculum_rows``. If the model does not reach the target, the hardest samples are never
    used. So choose a target that it surely reaches, and watch the iterator's ``difficulty`` during training.

    The batches depend on the losses reported to the iterator, not only on the position; ``get_state`` and ``set_state`` save
    and restore this state exactly. A loss takes effect two batches later. So the host does not wait for the step that
    the device is computing, and a resumed run draws the same batches as an uninterrupted one. All processes draw the same
    batches if they report the same losses. To use it in `effscale.training.fit`::

        batches = iter(LossDrivenBatches(rows, ranking, batch_size=8, target_loss=3.0))

        def step_and_report(state, batch):
            state, metrics = step(state, batch)
            batches.report(metrics["loss"])
            return state, metrics

        fit(state, step_and_report, batches, num_steps=1000)

    It yields whole batches and reads nothing ahead, as the next batch depends on the losses. Transform ``rows`` rather than the
    result, whose iterator would hide ``report``.

    References:
        Platanios et al., "Competence-based Curriculum Learning for Neural Machine Translation" (2019), where the competence is a
            function of the step. https://arxiv.org/abs/1903.09848

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
        """Create the dataset.

        Args:
            rows: The samples by id, with a length; pytrees of arrays.
            ranking: The samples from the easiest to the hardest.
            batch_size: The number of rows in a global batch.
            target_loss: The mean loss at which all samples are available.
            min_difficulty: The number of parts of the ranking that are available at first.
            max_difficulty: The number of parts into which the ranking is divided; the last one includes the remainder.
            window: The mean is over all losses until there are this many; after that, each new loss has a weight of 1 / window.
            seed: The seed of the order.
            process_index: The index of this process; it gets a contiguous part of each batch, as in `effscale.data.batch_rows`.
            process_count: The number of processes.

        Raises:
            ValueError: The ranking does not match the rows, or an argument is out of range.
        """
        super().__init__()
        check_ranking(ranking)
        num = len(ranking.samples)
        faults = [
            (
                num != len(rows),
                f"ranking must have one sample for each of the {len(rows)} rows, got {num}",
            ),
            (not math.isfinite(target_loss), f"target_loss must be finite, got {target_loss}"),
            (
                not 1 <= min_difficulty <= max_difficulty <= num,
                f"min_difficulty and max_difficulty must be increasing, from 1 to at most the number of samples {num}, "
                f"got {min_difficulty} and {max_difficulty}",
            ),
            (window < 1, f"window must be at least 1, got {window}"),
            (
                not 0 <= process_index < process_count,
                f"process_index must be from 0 to process_count-1={process_count - 1}, got {process_index}",
            ),
            (
                batch_size < 1 or batch_size % process_count != 0,
                f"batch_size must be a multiple of process_count={process_count}, got {batch_size}",
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
        """Return a new iterator from the start."""
        return LossDrivenIterator(self)


class LossDrivenIterator(grain.DatasetIterator):
    """The iterator of `LossDrivenBatches`.

    Attributes:
        difficulty: The number of percentiles available.
        mean: The running mean of the losses; None before the first loss.
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
        """Report the loss of the last batch: a number or an array with one element, which is not waited for. NaN is ignored."""
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
        """Update the mean with the losses of all batches except the last one."""
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
        """Return the state as plain numbers; this waits for the reported losses."""
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
        """Continue where the state was saved."""
        clusters = len(self._batches.clusters.sizes)
        if len(state["opened"]) > clusters:
            raise ValueError(
                f"the state must have at most {clusters} pools, like this curriculum, got {len(state['opened'])}. "
                "It was saved with a different min_difficulty or max_difficulty."
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
