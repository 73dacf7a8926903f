"""Pretraining of a GPT with a technique, for the experiments: ``quickstart`` runs it once, ``data_efficiency`` many times."""

import itertools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import grain
import jax
from flax import nnx

from effscale.curriculum import Difficulty, current_learning_rate, curriculum_rows, with_metrics
from effscale.curriculum.ranking import Ranking
from effscale.data import PackedTokens, TokenStore, batch_rows, make_dataset
from effscale.data_efficiency import rank_by_rarity
from effscale.experiments.shared.pretraining_config import PretrainingConfig
from effscale.experiments.shared.runs import run_to_end
from effscale.models import Transformer
from effscale.parallel import batch_shard, shard_batch, shardings
from effscale.training import (
    Checkpoints,
    Clip,
    ConsoleWriter,
    JsonlWriter,
    MultiWriter,
    StagedStep,
    TensorBoardWriter,
    TrainState,
    create_train_state,
    evaluate,
    make_eval_step,
    make_train_step,
    next_token_loss,
)
from effscale.training.buckets import Compilation
from effscale.training.step import count_tokens

_EVAL_STEP = jax.jit(make_eval_step(next_token_loss))  # shared, because no technique changes it


class Trained(NamedTuple):
    """The result of a training run.

    Attributes:
        state: The last state.
        stopped_reason: ``finished``, ``signal`` or ``data``, as in ``fit``.
        compilations: Compilations of the training step, including earlier runs with other seeds.
        signal: The signal, if that is the reason.
    """

    state: TrainState
    stopped_reason: str
    compilations: list[Compilation]
    signal: int | None


class Pretraining:
    """A model and its steps with a technique; runs with different seeds and learning rates share compiled programs.

    Args:
        config: Config of its runs. Its seed, folder and corpus are not used here.
        vocab_size: Vocabulary size of the tokenizer.
        mesh: The device mesh.
    """

    def __init__(self, config: PretrainingConfig, vocab_size: int, mesh: jax.sharding.Mesh):
        self.config, self.mesh = config, mesh
        self.plan = plan = config.plan(vocab_size)
        ltd = plan.ltd
        # With random-LTD, a step counts the tokens that a layer processes on average, and the learning rate follows
        # them.
        step = make_train_step(
            next_token_loss if ltd is None else ltd.loss(next_token_loss),
            config.optimizer.build(config.schedule()),
            accumulate=config.accumulate,
            clip=Clip(config.clip_norm),
            tokens_per_batch=count_tokens if ltd is None else ltd.tokens_per_batch(plan.model),
        )
        self.step = with_metrics(step, lambda state: current_learning_rate(state.opt_state))
        self._staged = self._stage()
        self._rankings: dict[pathlib.Path, Ranking] = {}

    def create(self, config: PretrainingConfig) -> TrainState:
        """Create the state before the first step.

        Args:
            config: Config of the run, which can differ from the constructor's in seed, learning rate and warmup.
        """
        model = Transformer(self.plan.model, rngs=nnx.Rngs(config.seed))
        optimizer = config.optimizer.build(config.schedule())
        return create_train_state(model, optimizer, key=jax.random.key(config.seed))

    def batches(
        self, stores: Sequence[TokenStore], *, seed: int, weights: Sequence[float] | None = None
    ) -> grain.IterDataset:
        """Return endless training batches, this process's part; with a curriculum, easy rows first.

        Raises:
            ValueError: There is too little text.
        """
        rows = self._rows()
        if self.plan.curriculum is None:
            return make_dataset(stores, seed=seed, weights=weights, **rows)
        (store,) = stores  # checked by the config
        packed = PackedTokens(store, rows.pop("length"))
        if len(packed) < 100:
            raise ValueError(
                f"a curriculum by percentiles needs at least 100 rows, but the corpus has {len(packed)} of length={packed.length}. "
                "Use more text or shorter rows"
            )
        if store.folder not in self._rankings:
            self._rankings[store.folder] = rank_by_rarity(packed)
        difficulty = Difficulty(
            ranking=self._rankings[store.folder],
            pacing=self.config.efficiency.rarity(self.config.steps),
            difficulty_type="percentile",
        )
        ordered = curriculum_rows(packed, difficulty, batch_size=self.config.batch_size, seed=seed)
        return batch_rows(ordered, **rows)

    def held_out(self, stores: Sequence[TokenStore]) -> grain.IterDataset:
        """Return all held-out tokens, in batches of whole rows."""
        return make_dataset(stores, shuffle=False, num_epochs=1, remainder="pad", **self._rows())

    def validate(
        self, state: TrainState, held_out: Iterable[Any], batches: int | None = None
    ) -> dict[str, float]:
        """Return the loss on the first ``batches`` held-out batches, on all tokens of whole rows; None uses all batches."""
        means = evaluate(
            state.model,
            _EVAL_STEP,
            itertools.islice(held_out, batches),
            place_batch=self._place,
        )
        return {"val_loss": means["loss"], "val_tokens_seen": int(state.tokens)}

    def train(
        self,
        batches: Iterable[Any],
        place: pathlib.Path,
        *,
        config: PretrainingConfig,
        evaluate: Callable[[TrainState], dict[str, float]],
        tensorboard: pathlib.Path,
        free_fields: Sequence[str] = (),
        compile_first: bool = False,
    ) -> Trained:
        """Train from the start or, with ``config.resume``, from the last checkpoint.

        Args:
            batches: From ``batches``; the position of their iterator is saved.
            place: Folder for metrics and checkpoints.
            config: Config of this run; equals the constructor's except for seed, learning rate and warmup.
            evaluate: Called every ``config.eval_every`` steps and at the end.
            tensorboard: Folder for TensorBoard events.
            free_fields: Fields of the config that can change when the run is resumed.
            compile_first: Compile all shapes before the second step, so that no compilation shares the machine with
            timed steps.
        """
        first = jax.process_index() == 0  # only the first of several processes writes
        iterator = iter(batches)
        create = lambda: self.create(config)
        staged = [self._staged]

        def restage() -> StagedStep:
            staged.append(self._stage())
            return staged[-1]

        def writer_of(start: int) -> MultiWriter:
            if not first:
                return MultiWriter([])
            resume_step = start if config.resume else None
            writers = [
                JsonlWriter(place / "metrics.jsonl", resume_step=resume_step),
                TensorBoardWriter(tensorboard, resume_step=resume_step),
                ConsoleWriter(self.plan.num_steps, start_step=start),
            ]
            return MultiWriter(writers)

        with Checkpoints(
            place / "checkpoints",
            config=config,
            free_fields=free_fields,
            keep=config.keep,
            every=config.checkpoint_every,
        ) as checkpoints:
            try:
                fitted = run_to_end(
                    self._staged,
                    iterator,
                    checkpoints,
                    writer_of=writer_of,
                    create=create,
                    num_steps=self.plan.num_steps,
                    evaluate=evaluate,
                    eval_every=config.eval_every,
                    resume=config.resume,
                    restage=restage,
                    compile_first=compile_first,
                    layout=shardings(jax.eval_shape(create), self.mesh),
                    place_batch=self._place,
                )
            finally:
                staged[-1].close()
        compilations = staged[-1].compilations
        return Trained(fitted.state, fitted.stopped_reason, compilations, fitted.signal)

    def _stage(self) -> StagedStep:
        plan = self.plan
        return StagedStep(self.step, plan.stages, plan.shape_batch, place_batch=self._place)

    def _place(self, batch: Any) -> Any:
        return shard_batch(batch, self.mesh)

    def _rows(self) -> dict[str, Any]:
        part = batch_shard(self.mesh)
        return {
            "batch_size": self.config.batch_size,
            "length": self.config.length,
            "process_index": part.index,
            "process_count": part.count,
        }
