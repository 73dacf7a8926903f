"""The runs of the experiment ``random_ltd_bert``: an arm's search, its pretraining by seed, and first steps at a high rate."""

import functools
import itertools
import math
import sys
from typing import Any

import jax
import optax
from flax import nnx

from effscale.data import Corpus
from effscale.experiments.random_ltd_bert.config import Config
from effscale.experiments.shared.masked_text import hidden_rows, with_mask
from effscale.experiments.shared.random_ltd.arms import Arm, ArmName
from effscale.experiments.shared.runs import once, train_to_end
from effscale.interop import save_pretrained
from effscale.models import Transformer
from effscale.study.search import Found, Point
from effscale.training import (
    RunFolder,
    TrainingDivergedError,
    TrainState,
    create_train_state,
    evaluate,
    make_eval_step,
    masked_token_loss,
    read_jsonl,
)
from effscale.training.serialize import write_json


class Pretraining:
    """Pretraining of an arm, compiled once for all seeds and learning rates.

    Args:
        name: Name of the arm.
        config: Config of the experiment.
        corpora: The prepared corpora.
        weights: Sampling weight of each corpus.
    """

    def __init__(
        self,
        name: ArmName,
        config: Config,
        corpora: tuple[Corpus, ...],
        weights: tuple[float, ...] | None,
    ):
        self.config, self.corpora, self.weights = config, corpora, weights
        self.tokenizer = with_mask(corpora[0].tokenizer)
        self.model_config = config.model.build(self.tokenizer.get_vocab_size(), config.length)
        self.arm = Arm(
            name=name,
            model=self.model_config,
            dropping=config.ltd,
            length=config.length,
            batch_size=config.batch_size,
            num_steps=config.steps,
        )
        step = self.arm.train_step(
            masked_token_loss,
            self._optimizer(config.start),
            clip_norm=config.clip_norm,
            accumulate=config.accumulate,
        )
        self._restage = functools.partial(self.arm.staged, step)
        self.step = self._restage()
        self.eval_step = jax.jit(make_eval_step(masked_token_loss))

    def name_of(self, seed: int) -> str:
        """Return the name of the run, which is also its folder inside the run folder."""
        return f"seed-{seed}/{self.arm.name}"

    def search(self, folder: RunFolder) -> Found:
        """Search for the arm's learning rate and warmup; finished runs are not repeated.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """

        def loss_of(point: Point) -> float:
            name = f"search/{self.arm.name}/{point.name}"
            seed, steps = self.config.search.seed, self.config.steps
            return self._last_loss(folder, name, seed, point, steps, "val_loss")

        return self.config.search.climb(self.config.start, loss_of, steps=self.config.steps)

    def run(self, folder: RunFolder, seed: int, point: Point) -> None:
        """Start a run, resume one that was stopped, or skip a finished one.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
            TrainingDivergedError: The loss or gradient is not finite for ten steps.
        """
        name = self.name_of(seed)

        def train() -> None:
            state = self._train(folder, name, seed, point, self.config.steps)
            save_pretrained(state.model, folder.path / name / "model", tokenizer=self.tokenizer)

        once(folder, name, train)

    def early(self, folder: RunFolder, seed: int) -> float:
        """Return the loss on part of the held-out text after the first steps at a high learning rate; infinite if
        they diverge.

        The warmup is the config's, with the same number of steps for both arms.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """
        early, name = self.config.early, f"early/seed-{seed}/{self.arm.name}"
        point = self.config.start._replace(learning_rate=early.learning_rate)
        return self._last_loss(folder, name, seed, point, early.steps, "part_val_loss")

    def _last_loss(
        self, folder: RunFolder, name: str, seed: int, point: Point, steps: int, metric: str
    ) -> float:
        place = folder.path / name

        def train() -> None:
            try:
                self._train(folder, name, seed, point, steps)
            except TrainingDivergedError as error:  # a result; the other runs continue
                print(f"{name} diverged at step {error.step}", file=sys.stderr)
                write_json(place / "diverged.json", {"step": error.step})

        once(folder, name, train)
        if (place / "diverged.json").is_file():
            return math.inf
        loss = read_jsonl(place / "metrics.jsonl")[-1][metric]
        return math.inf if loss is None else loss  # None stands for a value that was not finite

    def _train(
        self, folder: RunFolder, name: str, seed: int, point: Point, steps: int
    ) -> TrainState:
        return train_to_end(
            folder,
            name,
            self.step,
            iter(self._rows(seed, validation=False)),
            create=functools.partial(self._create, seed, point),
            num_steps=steps,
            evaluate=self._evaluate,
            every=self.config.eval_every,
            restage=self._restage,
        )

    def _rows(self, seed: int, *, validation: bool) -> Any:
        return hidden_rows(
            self.corpora,
            self.weights,
            validation=validation,
            length=self.config.length,
            batch_size=self.config.batch_size,
            hidden=self.config.hidden,
            seed=seed,
        )

    def _optimizer(self, point: Point) -> optax.GradientTransformation:
        return self.arm.optimizer(self.config.rate(point), self.config.optimizer)

    def _create(self, seed: int, point: Point) -> TrainState:
        model = Transformer(self.model_config, rngs=nnx.Rngs(seed))
        return create_train_state(model, self._optimizer(point), key=jax.random.key(seed))

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        def loss(batches: int | None) -> float:
            rows = self._rows(0, validation=True)  # the same masked tokens for all
            part = itertools.islice(rows, batches)
            return evaluate(state.model, self.eval_step, part)["loss"]

        values = {"part_val_loss": loss(self.config.eval_batches)}
        if int(state.step) == self.config.steps:
            values["val_loss"] = loss(None)
        return values
