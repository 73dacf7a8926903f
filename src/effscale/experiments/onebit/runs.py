"""The pretraining runs of the experiment ``onebit``: one per model, optimizer and seed."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from effscale.data import Corpus, make_dataset
from effscale.experiments.onebit.config import Config
from effscale.experiments.onebit.optimizers import AXIS, OptimizerName, build, learning_rate
from effscale.experiments.shared.masked_text import hidden_rows, with_mask
from effscale.experiments.shared.runs import once, train_to_end
from effscale.interop import save_pretrained
from effscale.models import Transformer, TransformerConfig
from effscale.parallel import simulate_workers
from effscale.training import (
    Loss,
    RunFolder,
    ShapeBuckets,
    TrainState,
    create_train_state,
    evaluate,
    make_eval_step,
    make_train_step,
    masked_token_loss,
    next_token_loss,
)

LOSSES: dict[str, Callable[..., Loss]] = {"gpt": next_token_loss, "bert": masked_token_loss}


def model_config(config: Config, task: str, vocab_size: int) -> TransformerConfig:
    """Return the transformer of a task, ``gpt`` or ``bert``; the latter has a mask token in addition to the vocabulary.

    Args:
        config: Config of the experiment.
        task: ``gpt`` or ``bert``.
        vocab_size: Vocabulary size of the tokenizer.
    """
    plan = getattr(config, task)
    return plan.model.build(vocab_size + (task == "bert"), plan.length)


def make_step(
    config: Config, task: str, name: OptimizerName, *, workers: int | None = None
) -> tuple[Callable[[TrainState, Any], Any], optax.GradientTransformation]:
    """Return the step of one worker, for ``per_worker`` or ``simulate_workers``, and its optimizer.

    Args:
        config: Config of the experiment.
        task: ``gpt`` or ``bert``.
        name: Name of the optimizer.
        workers: Number of workers. Required if no mesh defines the axis.
    """
    plan = getattr(config, task)
    peak = plan.lamb_rate if name in ("lamb", "onebit_lamb") else plan.adam_rate
    rate = learning_rate(peak, plan.final, plan.steps, plan.stages)
    optimizer = build(
        name,
        rate,
        moments=config.moments,
        stages=plan.stages,
        steps=plan.steps,
        workers=workers,
    )
    step = make_train_step(
        LOSSES[task],
        optimizer,
        accumulate=plan.accumulate,
        learning_rate=rate,
        axis_name=AXIS,
    )
    return step, optimizer


class Pretraining:
    """Pretraining of a task by an optimizer, compiled once for all seeds; the workers are simulated on one device.

    Args:
        config: Config of the experiment.
        task: ``gpt`` or ``bert``.
        name: Name of the optimizer.
        corpora: The prepared corpora.
        weights: Sampling weight of each corpus, or None.
    """

    def __init__(
        self,
        config: Config,
        task: str,
        name: OptimizerName,
        corpora: tuple[Corpus, ...],
        weights: tuple[float, ...] | None,
    ):
        self.config, self.task, self.name = config, task, name
        self.plan = getattr(config, task)
        self.corpora, self.weights = corpora, weights
        self.tokenizer = corpora[0].tokenizer if task == "gpt" else with_mask(corpora[0].tokenizer)
        self.model = model_config(config, task, corpora[0].vocab_size)
        step, self.optimizer = make_step(config, task, name, workers=config.workers)
        self.step = ShapeBuckets(simulate_workers(step, config.workers, AXIS), donate_argnums=0)
        self.eval_step = jax.jit(make_eval_step(LOSSES[task]))

    def name_of(self, seed: int) -> str:
        """Return the name of the run, which is also its folder inside the run folder."""
        return f"{self.task}/seed-{seed}/{self.name}"

    def run(self, folder: RunFolder, seed: int) -> None:
        """Start a run, resume one that was stopped, or skip a finished one.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """
        name = self.name_of(seed)

        def train() -> None:
            state = train_to_end(
                folder,
                name,
                self.step,
                iter(self._rows(seed, validation=False)),
                create=functools.partial(self._create, seed),
                num_steps=self.plan.steps,
                evaluate=self._evaluate,
                every=self.config.eval_every,
            )
            save_pretrained(state.model, folder.path / name / "model", tokenizer=self.tokenizer)

        once(folder, name, train)

    def _rows(self, seed: int, *, validation: bool) -> Any:
        shared: dict[str, Any] = {
            "length": self.plan.length,
            "batch_size": self.plan.batch_size,
            "seed": seed,
        }
        if self.task == "bert":
            return hidden_rows(
                self.corpora,
                self.weights,
                validation=validation,
                hidden=self.config.hidden,
                **shared,
            )
        if validation:
            stores = [corpus.validation for corpus in self.corpora]
            return make_dataset(stores, shuffle=False, num_epochs=1, remainder="pad", **shared)
        stores = [corpus.train for corpus in self.corpora]
        return make_dataset(stores, weights=self.weights, **shared)

    def _create(self, seed: int) -> TrainState:
        model = Transformer(self.model, rngs=nnx.Rngs(seed))
        return create_train_state(model, self.optimizer, key=jax.random.key(seed))

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        def loss(batches: int | None) -> float:
            rows = self._rows(0, validation=True)  # the same rows and masked tokens for all
            return evaluate(state.model, self.eval_step, itertools.islice(rows, batches))["loss"]

        values = {"part_val_loss": loss(self.config.eval_batches)}
        if int(state.step) == self.plan.steps:
            values["val_loss"] = loss(None)
        return values
