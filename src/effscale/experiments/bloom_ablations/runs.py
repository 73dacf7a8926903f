"""The runs of the experiment ``bloom_ablations``: each arm's search, and its runs by seed."""

import itertools
import json
import math
from typing import Any

import jax

from effscale.data import make_dataset
from effscale.data.corpus import Corpus
from effscale.experiments.bloom_ablations.config import ArmName, Config
from effscale.experiments.shared.pretraining import Pretraining
from effscale.experiments.shared.pretraining_run import pretrain_once
from effscale.study.search import Found, Point
from effscale.training import (
    RunFolder,
    TrainState,
    evaluate,
    make_eval_step,
    next_token_loss,
)

_EVAL_STEP = jax.jit(make_eval_step(next_token_loss))


class Runner:
    """Makes one run after another; programs compiled for an arm are used for all of its runs.

    Args:
        config: Config of the experiment.
        corpus: The prepared corpus.
        mesh: The device mesh.

    Raises:
        ValueError: There is too little text.
    """

    def __init__(self, config: Config, corpus: Corpus, mesh: jax.sharding.Mesh):
        self.config, self.corpus, self.mesh = config, corpus, mesh
        self._trainings = {
            arm: Pretraining(config.pretraining(arm), corpus.vocab_size, mesh)
            for arm in config.arms
        }
        for times in config.times_longer:
            self._held_out(times)

    def search(self, folder: RunFolder, arm: ArmName) -> Found:
        """Search for an arm's learning rate and warmup; finished runs are not repeated.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """

        def loss_of(point: Point) -> float:
            name = f"search/{arm}/{point.name}"
            self._once(folder, name, arm, self.config.search.seed, point)
            loss = json.loads((folder.path / name / "final.json").read_text())["losses"][0]
            return math.inf if loss is None else loss

        return self.config.search.climb(self.config.start, loss_of, steps=self.config.steps)

    def run(self, folder: RunFolder, arm: ArmName, seed: int, point: Point) -> None:
        """Start a run, resume one that was stopped, or skip a finished one. A run that diverges counts as finished.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """
        self._once(folder, f"{arm}/seed-{seed}", arm, seed, point)

    def _once(self, folder: RunFolder, name: str, arm: ArmName, seed: int, point: Point) -> None:
        training = self._trainings[arm]

        def measure(state: TrainState) -> dict[str, float]:
            loss = self._loss(state, 1, self.config.eval_batches)
            return {"part_val_loss": loss, "val_tokens_seen": int(state.tokens)}

        times = self.config.times_longer
        pretrain_once(
            *(folder, name, training, self.config.pretraining(arm, seed, point)),
            batches=lambda: training.batches([self.corpus.train], seed=seed),
            evaluate=measure,
            final=lambda trained: {"losses": [self._loss(trained.state, n, None) for n in times]},
            diverged={"losses": [None for _ in times]},
        )

    def _held_out(self, times: int) -> Any:
        """Return held-out batches of rows that are ``times`` times longer, with the same number of tokens per batch."""
        return make_dataset(
            self.corpus.validation,
            batch_size=max(self.config.batch_size // times, 1),
            length=self.config.length * times,
            shuffle=False,
            num_epochs=1,
            remainder="pad",
        )

    def _loss(self, state: TrainState, times: int, batches: int | None) -> float:
        chosen = itertools.islice(self._held_out(times), batches)
        return evaluate(state.model, _EVAL_STEP, chosen)["loss"]
