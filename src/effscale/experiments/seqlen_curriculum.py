"""Sequence-length curriculum: start with short sequences, to stay stable at 8x the batch size and 4x the learning
rate.

A small GPT is trained with a small batch at the learning rate tuned for it, with a large batch at a large learning
rate, and with the same large batch whose rows are short at first and grow. All arms see the same number of tokens, in
the same order for each seed.

The experiment measures the paper's signs of instability: how far the loss rises above its minimum, and the norm and
the maximum of Adam's variance. Adam has no weight decay. Higher learning rates of the large batch show where each arm
fails. A run that diverges is a result.

    python -m effscale.experiments.seqlen_curriculum
    python -m effscale.experiments.seqlen_curriculum --learning-rate-factors 4 --seeds 5
    python -m effscale.experiments.seqlen_curriculum --out runs/mine --resume

References:
    Li et al., "The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for Training GPT Models" (2021).
        https://arxiv.org/abs/2108.06084
"""

import dataclasses
import functools
import itertools
import math
import sys
from typing import Annotated, Any

import numpy as np
import optax

from effscale.curriculum import (
    SequenceLengthCurriculum,
    current_learning_rate,
    loss_ratio,
    steps_then_tokens,
    unstable_steps,
    variance_metrics,
)
from effscale.curriculum.lengths import truncate
from effscale.experiments.shared.config_parts import CorporaPart
from effscale.experiments.shared.gpt import ModelConfig
from effscale.experiments.shared.prepared import Text, prepared_corpora
from effscale.options import Bounds, PositiveFloat, PositiveInt, check
from effscale.parallel import MeshConfig, shard_batch
from effscale.run import Run
from effscale.study import Arm, Curves, Results, Study, Tradeoff, Trial, command
from effscale.study.folder import StudyPart
from effscale.training import (
    Clip,
    Evaluation,
    LinearPacing,
    Stages,
    TrainingDivergedError,
    TrainState,
    next_token_loss,
)
from effscale.training.metrics import step_seconds
from effscale.training.plotting import Records, cost_of_reaching, records_of, series
from effscale.training.staged import Changes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StudyPart, CorporaPart):
    """Options of the study; every field is a command-line option."""

    length: PositiveInt = 128
    """Full sequence length: tokens per row, and positions of the model."""
    tokens: PositiveInt = 750_000
    """Number of training tokens per run."""
    batch_size: PositiveInt = 4
    """Rows per small batch, over all devices."""
    batch_factor: Annotated[int, Bounds(at_least=2)] = 8
    """Rows per large batch, as a multiple of the small batch."""
    micro_batch: PositiveInt | None = None
    """Rows per micro-batch, to save memory; None does not split the batch."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of the small batch: it warms up by steps and decays by tokens, along a cosine to a tenth."""
    learning_rate_factors: tuple[PositiveFloat, ...] = (4.0, 16.0)
    """Peak learning rates of the large batch, as multiples of the small batch's. The curves show the first."""
    warmup: PositiveInt = 10
    """Warmup steps of each run."""
    curriculum: PositiveFloat = 1.2
    """Number of steps until rows reach the full length, as a multiple of the large batch's steps without a curriculum.
    Rows must reach the full length before the tokens are used up."""
    min_length: PositiveInt = 8
    """Sequence length at the curriculum's first step."""
    granularity: PositiveInt | None = None
    """Lengths are multiples of this, and each one costs a compilation; None gives about a dozen lengths."""
    model: ModelConfig = ModelConfig(d_model=128)
    """The model."""
    evaluations: PositiveInt = 16
    """Approximate number of evaluations per run; each is followed by a checkpoint."""
    eval_batches: PositiveInt = 4
    """Number of held-out batches per evaluation, with the size of the large batch; the same ones each time."""

    def __post_init__(self):
        super().__post_init__()
        part = self.micro_batch
        divisor = f"a divisor of batch_size={self.batch_size}, or None"
        check(self, part is None or self.batch_size % part == 0, "micro_batch", divisor)
        least = (self.warmup + 1) * self.large_batch * self.length
        enough = f"at least {least:,}, so that the large batch trains longer than its warmup"
        check(self, self.tokens >= least, "tokens", enough)
        factors = self.learning_rate_factors
        different = len(factors) >= 1 and len(set(factors)) == len(factors)
        check(self, different, "learning_rate_factors", "one or more different numbers")
        shorter = f"below length={self.length}"
        check(self, self.min_length < self.length, "min_length", shorter)
        self.model.build(self.vocab_size, self.length)  # raises for an invalid model
        plans(self)  # raises for an impossible curriculum

    @property
    def large_batch(self) -> int:
        """Rows per large batch."""
        return self.batch_size * self.batch_factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How an arm uses the token budget."""

    about: str
    """Description in tables and figures; L is the small batch's learning rate."""
    batch_size: int
    """Rows per batch."""
    factor: float
    """Peak learning rate, as a multiple of the small batch's."""
    lengths: Stages[int]
    """Sequence length by step."""
    num_steps: int
    """Smallest number of steps that consumes the tokens."""
    against: str = "small"
    """The arm that it is compared with."""


def plans(config: Config) -> dict[str, Plan]:
    """Return the arms: ``small``, then two for each multiple of the learning rate.

    Raises:
        ValueError: The tokens are used up before the curriculum reaches the full length.

    Example:
        >>> for name, plan in plans(PRESETS["paper"]).items():
        ...     print(name, plan.batch_size, plan.num_steps, len(plan.lengths.values))
        small 512 300000 1
        large_x4 4096 37500 1
        large_curriculum_x4 4096 60304 14
    """

    def plan(
        about: str, rows: int, lengths: Stages[int], factor: float = 1.0, **other: Any
    ) -> Plan:
        steps = lengths.steps_until(config.tokens, lambda length: rows * length)
        return Plan(
            about=about, batch_size=rows, factor=factor, lengths=lengths, num_steps=steps, **other
        )

    full, rows = Stages((0,), (config.length,)), config.large_batch
    found = {"small": plan("small batch", config.batch_size, full)}
    for factor in config.learning_rate_factors:
        name, about = f"large_x{factor:g}", f"large batch, {factor:g} L"
        plain = found[name] = plan(about, rows, full, factor)
        pacing = LinearPacing(
            min_difficulty=config.min_length,
            max_difficulty=config.length,
            total=max(1, round(config.curriculum * plain.num_steps)),
            difficulty_step=config.granularity,
        )
        growing = SequenceLengthCurriculum(pacing=pacing).stages(rows)
        grown = plan(f"{about}, short first", rows, growing, factor, against=name)
        # The mean of a linear schedule is the mean of its ends, and rounding lengths down only helps.
        enough = math.floor(200 * config.length / (config.length + config.min_length)) / 100
        whole = growing.starts[-1] < grown.num_steps
        wanted = (
            f"at most {enough:g}, so that rows reach the full length before the tokens are used up"
        )
        check(config, whole, "curriculum", wanted)
        found[f"large_curriculum_x{factor:g}"] = grown
    return found


PRESETS = {
    "smoke": Config(
        seeds=1,
        vocab_size=512,
        length=64,
        tokens=24_576,
        batch_size=2,
        learning_rate_factors=(4.0,),
        warmup=4,
        granularity=16,
        model=ModelConfig(num_layers=2, d_model=64, num_heads=2),
        evaluations=4,
        eval_batches=1,
    ),
    "default": Config(),
    # Li et al., 2021: GPT-2 with 1558M parameters; batches of 512 rows at 1.5e-4, and of 4096 rows at 6e-4 with 64 to
    # 1024 tokens per row over 45,000 steps, which is 1.2 times the number of such batches in 157B tokens. Adam has no
    # weight decay here either. `make aot` compiles its step with parameters sharded over 8 devices.
    "paper": Config(
        vocab_size=50257,
        length=1024,
        tokens=157_286_400_000,
        batch_size=512,
        micro_batch=64,
        learning_rate=1.5e-4,
        learning_rate_factors=(4.0,),
        warmup=3000,
        min_length=64,
        model=ModelConfig(
            num_layers=48, d_model=1600, num_heads=25, dropout=0.1, dtype="bfloat16", remat="full"
        ),
        evaluations=150,
        eval_batches=2,
    ),
}


def run(config: Config, plan: Plan, text: Text | None = None) -> Run:
    """Return the run of an arm; without a text only to be lowered.

    Its peak learning rate is ``step_size`` in the optimizer's state, so arms of equal shapes share a compiled program.
    """
    rate = steps_then_tokens(
        peak=1.0, warmup_steps=config.warmup, total_tokens=config.tokens, final=0.1
    )
    optimizer = optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.inject_hyperparams(optax.scale)(step_size=plan.factor * config.learning_rate),
        rate,
    )

    def reports(state: TrainState) -> dict[str, Any]:
        peak = optax.tree.get(state.opt_state, "step_size")
        rate = current_learning_rate(state.opt_state)["learning_rate"]
        return {**variance_metrics(state.opt_state), "learning_rate": peak * rate}

    every = max(1, plan.num_steps // config.evaluations)
    grows = len(plan.lengths.values) > 1
    described = Run(
        model=config.model.build(text.vocab_size if text else config.vocab_size, config.length),
        loss=next_token_loss,
        optimizer=optimizer,
        clip=Clip(1.0),
        accumulate=plan.batch_size // (config.micro_batch or plan.batch_size),
        num_steps=plan.num_steps,
        # Rows are truncated, not reshaped, as in the paper.
        changes=Changes(plan.lengths, truncate) if grows else None,
        reports=reports,
        checkpoint_every=every,
        mesh=MeshConfig(),
    )
    if text is None:
        return described
    from effscale.data import make_dataset  # grain is slow to import, and --help does not need it

    # The same rows at each evaluation, spread over the held-out text.
    held_out = make_dataset(
        text.validation,
        batch_size=config.large_batch,
        length=config.length,
        num_epochs=1,
        remainder="pad",
    )
    part = [*itertools.islice(held_out, config.eval_batches)]
    return dataclasses.replace(
        described,
        # Batches of any size read the rows of a seed in the same order.
        data=lambda seed: make_dataset(
            text.train,
            weights=text.weights,
            batch_size=plan.batch_size,
            length=config.length,
            seed=seed,
        ),
        evaluation=Evaluation(data=part, loss=next_token_loss, every=every),
    )


def signs(config: Config, records: Records) -> dict[str, float | int]:
    """Return the paper's signs of instability in the records of a run; NaN where one does not apply."""
    steps = [record for record in records if "loss" in record]
    of = lambda name: np.array([record[name] for record in steps], np.float64)  # null is NaN
    losses, after = of("loss"), slice(config.warmup, None)
    evaluated = [record["val_loss"] for record in records if "val_loss" in record]
    ratios = loss_ratio(losses)
    greatest = lambda values: float(np.fmax.reduce(values, initial=math.nan))
    found: dict[str, float | int] = {
        "unstable_steps": unstable_steps(losses),
        "greatest_loss_ratio": greatest(ratios),
        "greatest_pooled_loss_ratio": greatest(
            loss_ratio(pooled(losses, of("tokens"), config.large_batch * config.length))
        ),
        "greatest_val_loss_ratio": greatest(loss_ratio(np.array(evaluated, np.float64))),
        "grad_norm": greatest(of("grad_norm")[after]),
    }
    for name in ("variance_norm", "variance_max"):
        values = of(name)[after]
        found[name] = greatest(values)
        found[f"correlation_{name}"] = correlation(ratios[after], values)
    return found


def pooled(losses: np.ndarray, tokens: np.ndarray, window: int) -> np.ndarray:
    """Return the losses averaged over windows of as many tokens as a large batch has; NaN where a loss was not finite.

    The loss of a small batch varies more, because it averages over fewer tokens. Pooling makes the arms comparable.

    Args:
        losses: The loss of each step.
        tokens: The tokens seen after each step.
        window: Tokens per window; a step belongs to the window in which it begins.

    Example:
        >>> pooled(np.array([4.0, 2.0, 3.0]), np.array([8.0, 16.0, 32.0]), window=16).tolist()
        [3.0, 3.0]
    """
    before = np.concatenate([[0.0], tokens[:-1]])
    windows, each = (before // window).astype(int), tokens - before
    return np.bincount(windows, losses * each) / np.bincount(windows, each)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's correlation over the steps at which both are finite; NaN if one of them does not vary.

    >>> correlation(np.array([1.0, 2.0, np.nan, 3.0]), np.array([2.0, 4.0, 5.0, 6.0]))
    1.0
    """
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return round(float(np.corrcoef(a, b)[0, 1]), 12)


def study(config: Config) -> Study:
    """Return the comparison."""
    text = Text(*prepared_corpora(config))
    planned = plans(config)
    runs: dict[Any, Run] = {}
    for plan in planned.values():
        shared = runs.setdefault((plan.batch_size, plan.lengths), run(config, plan, text))
        # Too little text and rows that the devices cannot share raise here, before anything is written.
        shard_batch(next(iter(shared.data(0))), MeshConfig().build())

    def arm(plan: Plan) -> Arm:
        shared = runs[plan.batch_size, plan.lengths]
        peak = {"step_size": plan.factor * config.learning_rate}

        def train(trial: Trial) -> dict[str, Any]:
            try:
                metrics = trial.fit(shared, hyperparams=peak) | {"diverged": 0}
            except TrainingDivergedError as error:  # a result; its records end before the last step
                print(f"{trial.place} diverged at step {error.step}", file=sys.stderr)
                metrics = {"val_loss": math.nan, "diverged": 1}
            shape = {"factor": plan.factor, "lengths": len(plan.lengths.values)}
            return metrics | signs(config, records_of(trial.place)) | shape

        return Arm(about=plan.about, train=train, against=plan.against)

    first = tuple(planned)[:3]
    curves = {
        "training": ("loss", "training loss (nats per token)"),
        "validation": ("val_loss", "validation loss (nats per token)"),
        "variance_norm": ("variance_norm", "norm of Adam's variance"),
        "variance_max": ("variance_max", "maximum of Adam's variance"),
    }
    return Study(
        name="seqlen_curriculum",
        data=text.digests(),
        arms={name: arm(plan) for name, plan in planned.items()},
        baseline="small",
        columns={
            "unstable_steps": "unstable steps",
            "greatest_pooled_loss_ratio": "loss ratio, pooled",
            "variance_norm": "variance norm",
            "variance_max": "variance maximum",
            "updates": "updates",
            "step_seconds": "seconds",
        },
        plots=(
            *(
                Curves(
                    name=name, metric=metric, over="tokens", arms=first, labels=("tokens", label)
                )
                for name, (metric, label) in curves.items()
            ),
            Tradeoff(
                name="learning_rates",
                over="factor",
                logarithmic=True,
                labels=("learning rate (multiple of L)", "final loss (nats per token)"),
            ),
        ),
        figures=lambda results: {
            name: value
            for arm, plan in planned.items()
            if {arm, "small"} <= results.study.arms.keys()
            for name, value in reaching(results, arm, runs[plan.batch_size, plan.lengths]).items()
        },
    )


def reaching(results: Results, arm: str, run: Run) -> dict[str, float | int | None]:
    """Return how many runs of an arm reach the small batch's last loss with the same seed, and the mean cost until then."""
    tokens, seconds = [], []
    stages = None if run.changes is None else run.changes.stages
    for seed, records in enumerate(results.records(arm)):
        steps, losses = series(records, "val_loss")
        seen = dict(zip(*(x.tolist() for x in series(records, "tokens")), strict=True))
        goal = results.table.values("small", "val_loss").get(seed, math.nan)
        consumed = np.array([seen[step] for step in steps.tolist()])
        reached = cost_of_reaching(goal, losses, consumed)
        if reached is not None:
            tokens.append(reached)
            until = cost_of_reaching(goal, losses, steps)
            place = results.folder / arm / f"seed-{seed}"
            seconds.append(step_seconds(place, round(until or 0), stages))
    mean = lambda values: float(np.mean(values)) if values else None
    return {
        f"{arm}_reached": len(tokens),
        f"{arm}_tokens_to_reach": mean(tokens),
        f"{arm}_seconds_to_reach": mean(seconds),
    }


main = functools.partial(command.main, PRESETS, study, __doc__ or "")

if __name__ == "__main__":
    main()
