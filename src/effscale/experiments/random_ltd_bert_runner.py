"""The runs of the experiment ``random_ltd_bert``: pretraining, by arm and seed."""

import functools
import itertools
from typing import Any

import jax
from flax import nnx

from effscale.data import Corpus
from effscale.experiments.finetune_runner import once, train_to_end
from effscale.experiments.random_ltd import Arm, ArmName, LearningRate
from effscale.experiments.random_ltd_bert_data import hidden_rows, with_mask
from effscale.interop import save_pretrained
from effscale.models import Transformer
from effscale.training import (
    RunFolder,
    TrainState,
    create_train_state,
    evaluate,
    make_eval_step,
    masked_token_loss,
)


class Pretraining:
    """An arm's pretraining, compiled once for all seeds.

    Args:
        name: The arm.
        config: A ``random_ltd_bert.Config``.
        corpora: The text.
        weights: The share of each corpus.
    """

    def __init__(
        self,
        name: ArmName,
        config: Any,
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
        peak = config.learning_rate
        step, self.optimizer = self.arm.build(
            masked_token_loss,
            rate=LearningRate(peak=peak, warmup=config.warmup, final=peak / 10),
            optimizer=config.optimizer,
            clip_norm=config.clip_norm,
            accumulate=config.accumulate,
        )
        self._restage = functools.partial(self.arm.staged, step)
        self.step = self._restage()
        self.eval_step = jax.jit(make_eval_step(masked_token_loss))

    def name_of(self, seed: int) -> str:
        """The run's name, its folder inside the run folder."""
        return f"seed-{seed}/{self.arm.name}"

    def run(self, folder: RunFolder, seed: int) -> None:
        """Makes a run, goes on with one that was stopped, or leaves a finished one as it is.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
        """
        name = self.name_of(seed)

        def train() -> None:
            state = train_to_end(
                folder,
                name,
                self.step,
                iter(self._rows(seed, validation=False)),
                create=functools.partial(self._create, seed),
                num_steps=self.config.steps,
                evaluate=self._evaluate,
                every=self.config.eval_every,
                restage=self._restage,
            )
            save_pretrained(state.model, folder.path / name / "model", tokenizer=self.tokenizer)

        once(folder, name, train)

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

    def _create(self, seed: int) -> TrainState:
        model = Transformer(self.model_config, rngs=nnx.Rngs(seed))
        return create_train_state(model, self.optimizer, key=jax.random.key(seed))

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        def loss(batches: int | None) -> float:
            rows = self._rows(0, validation=True)  # the same tokens hidden for all
            part = itertools.islice(rows, batches)
            return evaluate(state.model, self.eval_step, part)["loss"]

        values = {"part_val_loss": loss(self.config.eval_batches)}
        if int(state.step) == self.config.steps:
            values["val_loss"] = loss(None)
        return values
