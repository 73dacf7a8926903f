"""The runs of the experiment ``bloom_ablations``: each arm's search, and its runs by seed."""

import dataclasses
import itertools
import json
import math
import sys
from typing import Any

import jax

from effscale.data import Corpus, make_dataset
from effscale.experiments.bloom_ablations.config import ArmName, Config
from effscale.experiments.shared.cli import StoppedBySignal
from effscale.experiments.shared.pretraining import Pretraining
from effscale.experiments.shared.pretraining_config import FREE
from effscale.experiments.shared.runs import once
from effscale.experiments.shared.search import Found, Point
from effscale.training import (
    RunFolder,
    TrainingDivergedError,
    TrainState,
    evaluate,
    make_eval_step,
    next_token_loss,
)
from effscale.training.serialize import write_json

_EVAL_STEP = jax.jit(make_eval_step(next_token_loss))


class Runner:
    """Makes one run after another; what is compiled for an arm serves all of its runs.

    Args:
        config: What the experiment was told.
        corpus: The text.
        mesh: Of devices.

    Raises:
        ValueError: If there is too little text.
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
        """Searches for an arm's learning rate and warmup; finished runs are not made again.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
        """

        def loss_of(point: Point) -> float:
            name = f"search/{arm}/{point.name}"
            self._once(folder, name, arm, self.config.search.seed, point)
            loss = json.loads((folder.path / name / "final.json").read_text())["losses"][0]
            return math.inf if loss is None else loss

        return self.config.search.climb(self.config.start, self.config.steps, loss_of)

    def run(self, folder: RunFolder, arm: ArmName, seed: int, point: Point) -> None:
        """Makes a run, continues one that was stopped, or leaves a finished one as it is; one that diverges is finished.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
        """
        self._once(folder, f"{arm}/seed-{seed}", arm, seed, point)

    def _once(self, folder: RunFolder, name: str, arm: ArmName, seed: int, point: Point) -> None:
        training, place = self._trainings[arm], folder.path / name
        config = self.config.pretraining(arm, seed, point)
        config = dataclasses.replace(config, out=place, resume=True)

        def measure(state: TrainState) -> dict[str, float]:
            loss = self._loss(state, 1, config.eval_batches)
            return {"part_val_loss": loss, "val_tokens_seen": int(state.tokens)}

        def train() -> None:
            with jax.set_mesh(self.mesh):
                try:
                    trained = training.train(
                        training.batches([self.corpus.train], seed=seed),
                        place,
                        config=config,
                        evaluate=measure,
                        tensorboard=folder.tensorboard / name,
                        free_fields=FREE,
                    )
                except (
                    TrainingDivergedError
                ) as error:  # a result, after which the other runs are made
                    print(f"{name} diverged at step {error.step}", file=sys.stderr)
                    losses: list[float | None] = [None] * len(self.config.times_longer)
                    write_json(place / "final.json", {"losses": losses})
                    return
                if trained.stopped_reason == "signal":
                    message = f"stopped and saved {name} at step {int(trained.state.step)}"
                    raise StoppedBySignal(message, trained.signal)
                found = [self._loss(trained.state, n, None) for n in self.config.times_longer]
            write_json(place / "final.json", {"losses": found})

        once(folder, name, train)

    def _held_out(self, times: int) -> Any:
        """Held-out batches of rows that are so many times longer, with as many tokens in a batch."""
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
