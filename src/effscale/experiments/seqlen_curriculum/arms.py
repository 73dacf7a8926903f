"""The runs of the experiment ``seqlen_curriculum``: a small batch, a large batch, and a large batch with growing rows."""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from effscale.curriculum.instability import LossRatioWriter, variance_metrics, with_metrics
from effscale.curriculum.learning_rate import current_learning_rate, steps_then_tokens
from effscale.curriculum.lengths import SequenceLengthCurriculum, truncate
from effscale.data import Corpus, make_dataset
from effscale.experiments.seqlen_curriculum.config import Config
from effscale.experiments.shared.runs import once, train_to_end
from effscale.models import Transformer
from effscale.options import check
from effscale.parallel import shard_batch, shardings
from effscale.training import (
    Clip,
    LinearPacing,
    RunFolder,
    StagedStep,
    Stages,
    TrainingDivergedError,
    TrainState,
    create_train_state,
    evaluate,
    make_eval_step,
    make_train_step,
    next_token_loss,
    read_jsonl,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to use the token budget.

    Attributes:
        name: The name in figures and folders: ``small``, ``large_x4``, ``large_curriculum_x4``, ...
        batch_size: Rows per batch.
        learning_rate: Peak learning rate.
        factor: Peak learning rate as a multiple of the small batch's.
        lengths: Sequence length by step.
        num_steps: Smallest number of steps that consumes the tokens.
    """

    name: str
    batch_size: int
    learning_rate: float
    factor: float
    lengths: Stages[int]
    num_steps: int

    def tokens(self, num_steps: int) -> int:
        """Return the number of training tokens in the first ``num_steps`` steps."""
        return self.batch_size * self.lengths.total(num_steps, lambda length: length)

    def eval_every(self, evaluations: int) -> int:
        """Return the steps between evaluations that give about ``evaluations`` of them."""
        return max(1, self.num_steps // evaluations)


def make_arms(config: Config) -> list[Arm]:
    """Return the arms of the experiment: ``small``, then two for each multiple of the learning rate.

    Raises:
        ValueError: The tokens are used up before the curriculum reaches the full length.

    Example:
        >>> from effscale.experiments.seqlen_curriculum import PRESETS
        >>> for arm in make_arms(PRESETS["paper"]):
        ...     print(arm.name, arm.batch_size, arm.learning_rate, arm.num_steps, len(arm.lengths.values))
        small 512 0.00015 300000 1
        large_x4 4096 0.0006 37500 1
        large_curriculum_x4 4096 0.0006 60304 14
    """
    full = Stages((0,), (config.length,))
    large = config.batch_size * config.batch_factor

    def arm(name: str, rows: int, factor: float, lengths: Stages[int]) -> Arm:
        return Arm(
            name=name,
            batch_size=rows,
            learning_rate=config.learning_rate * factor,
            factor=factor,
            lengths=lengths,
            num_steps=lengths.steps_until(config.tokens, lambda length: rows * length),
        )

    arms = [arm("small", config.batch_size, 1.0, full)]
    for factor in config.learning_rate_factors:
        plain = arm(f"large_x{factor:g}", large, factor, full)
        growing = curriculum(config, plain.num_steps).stages(large)
        grown = arm(f"large_curriculum_x{factor:g}", large, factor, growing)
        # The mean of a linear schedule is the mean of its ends, and rounding lengths down only helps.
        enough = math.floor(200 * config.length / (config.length + config.min_length)) / 100
        check(
            config,
            growing.starts[-1] < grown.num_steps,
            "curriculum",
            f"at most {enough:g}, so that rows reach the full length before the tokens are used up",
        )
        arms += [plain, grown]
    return arms


def curriculum(config: Config, large_steps: int) -> SequenceLengthCurriculum:
    """Return a curriculum whose sequence length grows linearly.

    Args:
        config: Config of the experiment.
        large_steps: Number of steps of the large batch without a curriculum.
    """
    pacing = LinearPacing(
        min_difficulty=config.min_length,
        max_difficulty=config.length,
        total=max(1, round(config.curriculum * large_steps)),
        difficulty_step=config.granularity,
    )
    return SequenceLengthCurriculum(pacing=pacing)


class PeakState(NamedTuple):
    """The state of ``scale_by_peak``.

    Attributes:
        peak: The peak learning rate, float32.
    """

    peak: Any


def scale_by_peak(peak: float) -> optax.GradientTransformation:
    """Multiply updates by a value that is stored in the state, so that one program serves all peak learning rates."""

    def init(params: Any) -> PeakState:
        del params
        return PeakState(jnp.float32(peak))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, PeakState]:
        del params
        return jax.tree.map(lambda u: u * state.peak.astype(u.dtype), updates), state

    return optax.GradientTransformation(init, update)


def make_optimizer(config: Config, peak: float) -> optax.GradientTransformation:
    """Create Adam with the paper's decay rates and no weight decay; the learning rate warms up by steps and decays by tokens, from ``peak``
    to a tenth.
    """
    rate = steps_then_tokens(
        peak=1.0, warmup_steps=config.warmup, total_tokens=config.tokens, final=0.1
    )
    return optax.chain(optax.scale_by_adam(b1=0.9, b2=0.95), scale_by_peak(peak), rate)


def make_step(config: Config, batch_size: int) -> Any:
    """Return the training step, not jitted, for any peak learning rate; it reports the signs of instability."""
    step = make_train_step(
        next_token_loss,
        make_optimizer(config, peak=1.0),  # the state contains the peak of its run
        accumulate=batch_size // (config.micro_batch or batch_size),
        clip=Clip(config.clip_norm),
    )

    def report(state: TrainState) -> dict[str, Any]:
        _, scale, _ = state.opt_state
        rate = current_learning_rate(state.opt_state)["learning_rate"]
        return {**variance_metrics(state.opt_state), "learning_rate": scale.peak * rate}

    return with_metrics(step, report)


def create_state(config: Config, vocab_size: int, peak: float, seed: int) -> TrainState:
    """Return the state before the first step of a run with that peak learning rate."""
    optimizer = make_optimizer(config, peak)
    model = Transformer(config.model.build(vocab_size, config.length), rngs=nnx.Rngs(seed))
    return create_train_state(model, optimizer, key=jax.random.key(seed))


class Training:
    """Trains the arms on a corpus, one after another; runs with equal shapes share compiled programs.

    Args:
        config: Config of the experiment.
        corpora: The prepared corpora.
        weights: Sampling weight of each corpus, or None.

    Raises:
        ValueError: The corpus is too small, or a batch cannot be sharded over the devices.
    """

    def __init__(
        self, config: Config, corpora: Sequence[Corpus], weights: Sequence[float | int] | None
    ):
        self.config, self.weights = config, weights
        self.mesh = config.mesh.build()
        self.stores = [corpus.train for corpus in corpora]
        self.vocab_size = corpora[0].vocab_size
        self._place(np.zeros(config.batch_size, np.int8))
        large = config.batch_size * config.batch_factor
        self.batches(large, seed=0)  # raises if there is too little text
        # The same rows at each evaluation, spread over the held-out text.
        held_out = make_dataset(
            [corpus.validation for corpus in corpora],
            batch_size=large,
            length=config.length,
            num_epochs=1,
            remainder="pad",
        )
        self.held_out = [*itertools.islice(held_out, config.eval_batches)]
        self.eval_step = jax.jit(make_eval_step(next_token_loss))
        self._staged: dict[Any, StagedStep] = {}

    def run(self, folder: RunFolder, arm: Arm) -> None:
        """Start an arm's runs, resume one that was stopped, and skip finished ones.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """
        for seed in range(self.config.seeds):
            name = f"seed-{seed}/{arm.name}"
            once(folder, name, functools.partial(self._train, folder, name, arm, seed))

    def close(self) -> None:
        """Cancel pending compilations."""
        for staged in self._staged.values():
            staged.close()

    def _stage(self, arm: Arm) -> StagedStep:
        """Return the arm's step; arms with equal shapes share it, because their learning rates are in the state."""
        key = arm.batch_size, arm.lengths
        if key not in self._staged:
            self._staged[key] = self._restage(arm)
        return self._staged[key]

    def _restage(self, arm: Arm) -> StagedStep:
        # Rows are truncated, not reshaped, as in the paper; only the curriculum truncates.
        step = make_step(self.config, arm.batch_size)
        return StagedStep(step, arm.lengths, truncate, place_batch=self._place)

    def _train(self, folder: RunFolder, name: str, arm: Arm, seed: int) -> None:
        create = functools.partial(
            create_state, self.config, self.vocab_size, arm.learning_rate, seed
        )
        metrics = folder.path / name / "metrics.jsonl"
        with jax.set_mesh(self.mesh):
            try:
                train_to_end(
                    folder,
                    name,
                    self._stage(arm),
                    iter(self.batches(arm.batch_size, seed)),
                    create=create,
                    num_steps=arm.num_steps,
                    evaluate=self._evaluate,
                    every=arm.eval_every(self.config.evaluations),
                    restage=functools.partial(self._restage, arm),
                    wrap_writer=lambda writer: LossRatioWriter(writer, read_jsonl(metrics)),
                    layout=shardings(jax.eval_shape(create), self.mesh),
                    place_batch=self._place,
                )
            except TrainingDivergedError as error:  # a result: its records end before the last step
                print(f"{name} diverged at step {error.step}", file=sys.stderr)

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        means = evaluate(state.model, self.eval_step, self.held_out, place_batch=self._place)
        return {"val_loss": means["loss"], "val_tokens_seen": int(state.tokens)}

    def batches(self, rows: int, seed: int) -> grain.IterDataset:
        """Return endless training batches; batches of any size use the rows of a seed in the same order."""
        return make_dataset(
            self.stores,
            batch_size=rows,
            length=self.config.length,
            seed=seed,
            weights=self.weights,
        )

    def _place(self, batch: Any) -> Any:
        return shard_batch(batch, self.mesh)
