"""BLOOM's design choices at small scale: ALiBi against rotary and learned positions, also on rows longer than in
training, and the norm after the embedding.

All arms are the same model except for the choice they test, and learn from the same rows in the same order. Each arm
gets the same tuning: a search with the same rule, with a seed that is not used in the comparison, finds its learning
rate and warmup. If there is a search, it measures the first half of the held-out rows, and the comparison the second
half.

Then each arm is trained with several seeds and evaluated on the same held-out text, split into rows of the training
length and into longer ones. Nothing is learned about positions beyond the training length, so there a table of
learned positions still has its initial values.

    python -m effscale.experiments.bloom_ablations
    python -m effscale.experiments.bloom_ablations --arms alibi rotary --corpus 'text:books/*.txt'
    python -m effscale.experiments.bloom_ablations --out runs/mine --resume

References:
    Le Scao et al., "BLOOM: A 176B-Parameter Open-Access Multilingual Language Model" (2022), section 3.2.
        https://arxiv.org/abs/2211.05100
    Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation" (2021).
        https://arxiv.org/abs/2108.12409
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax

from effscale.curriculum import current_learning_rate, steps_then_tokens
from effscale.experiments.shared.config_parts import TextPart
from effscale.experiments.shared.gpt import ModelConfig
from effscale.experiments.shared.prepared import Text, prepared_corpora
from effscale.models import TransformerConfig, bloom
from effscale.models.config import TokenInputs
from effscale.models.positions import LearnedPositions, Rotary
from effscale.options import NonNegativeInt, PositiveFloat, PositiveInt, check
from effscale.parallel import MeshConfig
from effscale.run import Run
from effscale.study import Arm, Point, Results, Search, Study, Trial, command
from effscale.study.folder import StudyPart
from effscale.study.plots import Plot
from effscale.training import AdamWConfig, Clip, Evaluation, TrainState, next_token_loss
from effscale.training.plotting import COLORS, band

ARMS = {
    "alibi": "ALiBi (BLOOM)",
    "rotary": "rotary positions",
    "learned": "learned positions",
    "alibi_without_norm": "ALiBi, no embedding norm",
}
"""The name of each arm in tables and figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StudyPart, TextPart):
    """Options of the study; every field is a command-line option."""

    corpus: tuple[str] = ("stdlib",)
    """The corpus: stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field or hf:NAME_OR_FOLDER#field."""
    length: PositiveInt = 64
    """Sequence length: tokens per training row."""
    times_longer: tuple[PositiveInt, ...] = (1, 2, 4, 8)
    """Lengths of the evaluation rows, as multiples of the training length."""
    batch_size: PositiveInt = 16
    """Rows per batch, over all devices."""
    accumulate: PositiveInt = 1
    """Number of micro-batches that a batch is split into, to save memory."""
    steps: PositiveInt = 500
    """Optimizer steps per run."""
    model: ModelConfig = ModelConfig(
        num_layers=4, d_model=128, num_heads=4, remat="none", init_std=0.051
    )
    """The model; each arm changes one thing. The standard deviation of the initial weights is sqrt(1 / (3 d_model))."""
    learning_rate: PositiveFloat = 4e-3
    """Peak learning rate at the start of each arm's search: a linear warmup, then a cosine to a tenth."""
    warmup: NonNegativeInt = 40
    """Warmup steps at the start of the search."""
    search: Search = Search(learning_rate_factor=2.0, points=5)
    """The search for each arm's learning rate and warmup."""
    eval_every: PositiveInt = 100
    """Steps between evaluations on part of the held-out rows, and between checkpoints; the last evaluation is on all of them."""
    eval_batches: PositiveInt = 12
    """Number of batches in that part."""

    def __post_init__(self):
        super().__post_init__()
        divisor = f"a divisor of batch_size={self.batch_size}"
        check(self, self.batch_size % self.accumulate == 0, "accumulate", divisor)
        longer = self.times_longer
        rises = list(longer) == sorted(set(longer)) and longer[:1] == (1,)
        check(self, rises, "times_longer", "increasing whole numbers starting with 1")
        check(self, self.warmup < self.steps, "warmup", f"from 0 to below steps={self.steps}")
        for arm in ARMS:
            transformer(self, arm, self.vocab_size)  # raises for an invalid model


def transformer(config: Config, arm: str, vocab_size: int) -> TransformerConfig:
    """Return the model of an arm: a BLOOM, or one with other positions or without the norm after the embedding."""
    how = config.model
    model = bloom(
        num_layers=how.num_layers,
        d_model=how.d_model,
        num_heads=how.num_heads,
        vocab_size=vocab_size,
        dropout=how.dropout,
    )
    longest = max(config.times_longer) * config.length
    positions = {"rotary": Rotary(), "learned": LearnedPositions(num=longest)}
    inputs = model.inputs
    if arm == "alibi_without_norm":
        assert isinstance(inputs, TokenInputs)
        inputs = dataclasses.replace(inputs, norm=None)
    return dataclasses.replace(
        model,
        positions=positions.get(arm, model.positions),
        inputs=inputs,
        dtype=how.dtype,
        remat=how.remat,
        init_std=how.init_std,
    )


PRESETS = {
    "smoke": Config(
        seeds=1,
        vocab_size=512,
        length=32,
        times_longer=(1, 2),
        batch_size=8,
        steps=8,
        warmup=2,
        search=Search(points=2),
        model=ModelConfig(num_layers=1, d_model=32, num_heads=2, remat="none", init_std=0.1),
        eval_batches=2,
        eval_every=4,
    ),
    "default": Config(),
    # The BLOOM paper compared positions with a model of 6.7 billion parameters on 300 billion tokens, and Le Scao et al.,
    # "What language model to train if you have one million GPU hours?", 2022, with 1.3 billion on 112 billion tokens: this
    # size, with their batch and rate.
    "paper": Config(
        vocab_size=50257,
        length=2048,
        times_longer=(1, 2),
        batch_size=512,
        accumulate=16,
        steps=107_000,
        warmup=1_800,
        learning_rate=2e-4,
        search=Search(points=1),
        model=ModelConfig(
            num_layers=24, d_model=2048, num_heads=16, dtype="bfloat16", remat="full", init_std=0.02
        ),
        eval_every=1000,
        eval_batches=20,
    ),
}


def rates(config: Config, point: Point) -> dict[str, float]:
    """Return the values of the schedule at a point of the search, which are part of the optimizer's state."""
    return {
        "peak": point.learning_rate,
        "warmup_steps": min(point.warmup, config.steps - 1),
        "final": point.learning_rate / 10,
    }


def run(config: Config, arm: str, vocab_size: int) -> Run:
    """Return the run of an arm at the start of its search, without data; all points compile to one program."""
    rate = optax.inject_hyperparams(steps_then_tokens, static_args="kind")(
        total_tokens=float(config.steps * config.batch_size * config.length),
        **rates(config, Point(config.learning_rate, config.warmup)),
    )
    return Run(
        model=transformer(config, arm, vocab_size),
        loss=next_token_loss,
        optimizer=AdamWConfig().build(rate),
        clip=Clip(1.0),
        accumulate=config.accumulate,
        num_steps=config.steps,
        reports=lambda state: current_learning_rate(state.opt_state),
        checkpoint_every=config.eval_every,
        mesh=MeshConfig(),
    )


def metric(times: int) -> str:
    """Return the name of the loss on rows that are so many times longer than in training."""
    return "val_loss" if times == 1 else f"val_loss_{times}_times_longer"


def held_out(config: Config, text: Text, times: int, *, tuning: bool) -> Evaluation:
    """Return the evaluation on longer rows, in batches of as many tokens: with a search, a half for it and a half for the comparison."""
    from effscale.data import make_dataset  # grain is slow to import, and --help does not need it

    rows = list(
        make_dataset(
            text.validation,
            batch_size=max(config.batch_size // times, 1),
            length=config.length * times,
            shuffle=False,
            num_epochs=1,
            remainder="pad",
        )
    )
    if config.search.points > 1:
        half = len(rows) // 2
        rows = rows[:half] if tuning else rows[half:]
    return Evaluation(data=rows, loss=next_token_loss, batches=config.eval_batches)


def study(config: Config) -> Study:
    """Return the comparison."""
    text = Text(*prepared_corpora(config))
    # The search needs the loss at the training length only.
    tuned = {1: held_out(config, text, 1, tuning=True)}
    reported = {n: held_out(config, text, n, tuning=False) for n in config.times_longer}

    def measure(state: TrainState) -> dict[str, Any]:
        return tuned[1](state.model) | {"val_tokens_seen": int(state.tokens)}

    def arm(name: str) -> Arm:
        described = text.next_token_run(run(config, name, text.vocab_size), config)
        one = dataclasses.replace(described, evaluation=measure, eval_every=config.eval_every)

        def train(trial: Trial) -> dict[str, Any]:
            assert trial.point is not None
            metrics = trial.fit(one, hyperparams=rates(config, trial.point), keep_model=True)
            with jax.set_mesh(one.device_mesh()):
                model = trial.model(one)
                for times, losses in (tuned if trial.tuning else reported).items():
                    metrics[metric(times)] = losses(model, last=True)["val_loss"]
            return metrics

        start = Point(config.learning_rate, config.warmup)
        return Arm(about=ARMS[name], train=train, start=start)

    longer = {metric(n): f"{n * config.length} tokens" for n in config.times_longer[1:]}
    return Study(
        name="bloom_ablations",
        data=text.digests(),
        arms={name: arm(name) for name in ARMS},
        baseline="alibi",
        search=config.search,
        columns=longer | {"updates": "updates", "step_seconds": "seconds"},
        plots=(Lengths(name="bloom_ablations", length=config.length, times=config.times_longer),),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths(Plot):
    """The loss by sequence length: mean and range over seeds."""

    length: int
    """The length in training."""
    times: tuple[int, ...]
    """The lengths in evaluation, as multiples of it."""

    def draw(self, axes: Any, results: Results) -> None:
        """Draw a line per arm."""
        lengths = [self.length * times for times in self.times]
        for color, (name, arm) in zip(COLORS, results.study.arms.items(), strict=False):
            found = [results.table.values(name, metric(n)) for n in self.times]
            curves = [[each.get(seed, np.nan) for each in found] for seed in found[0]]
            style = {"color": color, "marker": "o", "markersize": 4}
            band(axes, np.array(lengths), np.array(curves), label=arm.about, **style)
        axes.axvline(self.length, color="gray", linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set(
            xlabel=f"sequence length in evaluation (dashed: in training, {self.length})",
            ylabel="loss (nats per token)",
        )
        axes.legend(fontsize=8)


main = functools.partial(command.main, PRESETS, study, __doc__ or "")

if __name__ == "__main__":
    main()
