"""Pretrain a GPT with less data: curriculum learning, random-LTD and both, compared with the baseline.

Each technique trains on the whole token budget and on fractions of it, with several seeds. The budget counts
layer-averaged tokens: those that a layer processes, averaged over the layers. A technique that uses short rows or
drops tokens therefore takes more steps on the same budget. Validation is on all tokens of whole rows. The comparison
covers the final loss, and the data, operations and time that each technique needs to reach the loss of the baseline.

Every technique gets the same tuning: its learning rate warms up by steps, and a search with the same rule, with a
seed that is not used in the comparison, finds its peak and warmup. If there is a search, it measures the first half of
the held-out rows, and the comparison the second half.

    python -m effscale.experiments.data_efficiency
    python -m effscale.experiments.data_efficiency --arms none_100 ltd_100 ltd_67 none_67 --seeds 5
    python -m effscale.experiments.data_efficiency --out runs/mine --resume

References:
    Li et al., "DeepSpeed Data Efficiency: Improving Deep Learning Model Quality and Training Efficiency via Efficient
        Data Sampling and Routing" (2022), section 4.1. https://arxiv.org/abs/2212.03597
"""

import dataclasses
import functools
import itertools
from typing import Annotated, Any, get_args

import jax
import numpy as np
import optax

from effscale import curriculum
from effscale import data as datasets
from effscale.curriculum import (
    Difficulty,
    current_learning_rate,
    steps_then_tokens,
)
from effscale.data_efficiency import (
    CURRICULA,
    DataEfficiencyConfig,
    Plan,
    Technique,
    make_plan,
    rank_by_rarity,
)
from effscale.experiments.shared.config_parts import TextPart
from effscale.experiments.shared.gpt import ModelConfig
from effscale.experiments.shared.prepared import Text, prepared_corpora
from effscale.options import Bounds, NonNegativeInt, PositiveFloat, PositiveInt, check
from effscale.parallel import MeshConfig, shard_batch
from effscale.run import Run
from effscale.study import Arm, Curves, Finals, Point, Results, Search, Study, Trial, command
from effscale.study.folder import StudyPart
from effscale.training import AdamWConfig, Clip, Evaluation, TrainState, next_token_loss
from effscale.training.metrics import step_seconds
from effscale.training.plotting import cost_of_reaching, curves_of

NAMES: dict[Technique, str] = {
    "none": "plain training",
    "cl": "curriculum",
    "ltd": "random-LTD",
    "cl_ltd": "curriculum + random-LTD",
}
"""The name of each technique in tables and figures."""

COSTS = ("tokens_read", "tokens_trained", "layer_tokens", "teraflops", "step_seconds")
"""The costs that are compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StudyPart, TextPart):
    """Options of the study; every field is a command-line option."""

    fractions: tuple[Annotated[float, Bounds(above=0, at_most=1)], ...] = (1.0, 0.67, 0.5)
    """Fractions of the token budget; must include 1."""
    efficiency: DataEfficiencyConfig = DataEfficiencyConfig()
    """The schedules of the techniques."""
    corpus: tuple[str] = ("stdlib",)
    """The corpus: stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field or hf:NAME_OR_FOLDER#field."""
    vocab_size: PositiveInt = 1024
    validation_fraction: float = 0.03
    length: PositiveInt = 256
    """Sequence length: tokens per row, and positions of the model."""
    batch_size: PositiveInt = 8
    """Rows per batch, over all devices."""
    accumulate: PositiveInt = 1
    """Number of micro-batches that a batch is split into, to save memory."""
    steps: PositiveInt = 400
    """Optimizer steps of the baseline on the whole budget, which is this number of full batches."""
    model: ModelConfig = ModelConfig(num_layers=6, d_model=128, num_heads=4, remat="none")
    """The model."""
    learning_rate: PositiveFloat = 4.5e-3
    """Peak learning rate at the start of the search: a linear warmup by steps, then a cosine by layer-averaged tokens to a tenth."""
    warmup: NonNegativeInt = 160
    """Warmup steps at the start of the search. Runs on a fraction of the budget use that fraction of the warmup that it finds."""
    search: Search = Search()
    """The search for each technique's learning rate and warmup, on the whole budget."""
    evaluations: PositiveInt = 10
    """Number of evaluations of the baseline on the whole budget, on part of the held-out rows; the last evaluation is on all rows."""
    eval_batches: PositiveInt = 12
    """Number of batches in that part."""
    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints."""
    mesh: MeshConfig = MeshConfig()
    """Device mesh: the size of each axis; -1 means all remaining devices."""

    def __post_init__(self):
        super().__post_init__()
        divisor = f"a divisor of batch_size={self.batch_size}"
        check(self, self.batch_size % self.accumulate == 0, "accumulate", divisor)
        different = len(set(self.fractions)) == len(self.fractions) and 1.0 in self.fractions
        check(self, different, "fractions", "different numbers that include 1.0")
        check(self, self.warmup < self.steps, "warmup", f"from 0 to below steps={self.steps}")
        within = f"from 1 to steps={self.steps}"
        check(self, self.evaluations <= self.steps, "evaluations", within)
        for technique in NAMES:
            for fraction in self.fractions:
                plan(self, technique, fraction, self.vocab_size)  # raises for an impossible plan


def plan(config: Config, technique: Technique, fraction: float, vocab_size: int) -> Plan:
    """Return the shapes of an arm and its number of steps."""
    return make_plan(
        technique,
        config.efficiency,
        config.model.build(vocab_size, config.length),
        steps=round(config.steps * fraction),
        batch_size=config.batch_size,
        length=config.length,
    )


def run(
    config: Config,
    technique: Technique,
    fraction: float,
    point: Point,
    vocab_size: int,
) -> Run:
    """Return the run of an arm, without data.

    The values of the learning rate are part of the optimizer's state, so all points of a search compile to one program.
    """
    steps = round(config.steps * fraction)
    rate = optax.inject_hyperparams(steps_then_tokens, static_args="kind")(
        peak=point.learning_rate,
        warmup_steps=min(round(point.warmup * fraction), steps - 1),
        total_tokens=float(steps * config.batch_size * config.length),
        final=point.learning_rate / 10,
    )
    return plan(config, technique, fraction, vocab_size).applied_to(
        Run(
            model=None,
            num_steps=steps,
            optimizer=AdamWConfig().build(rate),
            clip=Clip(1.0),
            accumulate=config.accumulate,
            reports=lambda state: current_learning_rate(state.opt_state),
            eval_every=config.steps // config.evaluations,
            checkpoint_every=config.checkpoint_every,
            mesh=config.mesh,
        )
    )


PRESETS = {
    "smoke": Config(
        fractions=(1.0, 0.5),
        seeds=1,
        efficiency=DataEfficiencyConfig(min_length=32, min_kept=32, granularity=32),
        vocab_size=512,
        length=64,
        batch_size=4,
        steps=32,
        warmup=4,
        search=Search(points=2),
        model=ModelConfig(num_layers=3, d_model=32, num_heads=2, remat="none"),
        evaluations=4,
        eval_batches=2,
        checkpoint_every=16,
    ),
    "default": Config(),
    # The paper's GPT-3 1.3B: 300 billion tokens in batches of 512 rows; its lengths grow by 8 and 16 tokens, these by
    # 128. Its learning rate ends at 1e-6, here at a tenth of the peak.
    "paper": Config(
        efficiency=DataEfficiencyConfig(
            curriculum=110_000 / 286_102,
            min_length=80,
            dropping=200_000 / 286_102,
            min_kept=128,
            granularity=128,
        ),
        vocab_size=50257,
        length=2048,
        batch_size=512,
        accumulate=4,
        steps=286_102,
        warmup=2861,
        learning_rate=2e-4,
        search=Search(points=1),
        model=ModelConfig(
            num_layers=24,
            d_model=2048,
            num_heads=16,
            dtype="bfloat16",
            remat="full",
            init_std=0.013,
        ),
        mesh=MeshConfig(fsdp=8),
        evaluations=100,
        checkpoint_every=1000,
    ),
}


class Rows:
    """Batches of the text: training rows, easy ones first with a curriculum, and held-out rows.

    Raises:
        ValueError: There is too little text.
    """

    def __init__(self, config: Config, text: Text):
        self.config, self.store, self.validation = config, text.train[0], text.validation
        self.shape: dict[str, Any] = {"batch_size": config.batch_size, "length": config.length}
        self.packed = datasets.PackedTokens(self.store, config.length)
        if len(self.packed) < 100:
            raise ValueError(
                f"a curriculum by percentiles needs at least 100 rows, but the corpus has {len(self.packed)} of length={config.length}. "
                "Use more text or shorter rows"
            )

    @functools.cached_property
    def ranking(self) -> Any:
        """The rows from frequent to rare tokens."""
        return rank_by_rarity(self.packed)

    def train(self, technique: Technique, steps: int, seed: int) -> Any:
        """Return endless training batches."""
        if technique not in CURRICULA:
            return datasets.make_dataset([self.store], seed=seed, **self.shape)
        difficulty = Difficulty(
            ranking=self.ranking,
            pacing=self.config.efficiency.rarity(steps),
            difficulty_type="percentile",
        )
        size = self.config.batch_size
        ordered = curriculum.curriculum_rows(self.packed, difficulty, batch_size=size, seed=seed)
        return datasets.batch_rows(ordered, batch_size=size)

    def held_out(self, *, tuning: bool) -> list[Any]:
        """Return all held-out batches; with a search, a half for it and a half for the comparison."""
        rows = list(
            datasets.make_dataset(
                self.validation, shuffle=False, num_epochs=1, remainder="pad", **self.shape
            )
        )
        if self.config.search.points == 1:
            return rows
        half = len(rows) // 2
        return rows[:half] if tuning else rows[half:]


def study(config: Config) -> Study:
    """Return the comparison."""
    text = Text(*prepared_corpora(config))
    rows = Rows(config, text)
    mesh = config.mesh.build()
    place = functools.partial(shard_batch, mesh=mesh)
    held_out = {tuning: rows.held_out(tuning=tuning) for tuning in (True, False)}

    def arm(technique: Technique, fraction: float) -> Arm:
        planned = plan(config, technique, fraction, text.vocab_size)

        @functools.lru_cache(maxsize=1)  # the seeds of a point share a compiled run
        def run_at(point: Point, tuning: bool) -> tuple[Run, Evaluation]:
            part = held_out[tuning][: config.eval_batches]
            losses = functools.partial(Evaluation, loss=next_token_loss)
            some, every = losses(data=part), losses(data=held_out[tuning])

            def measure(state: TrainState) -> dict[str, Any]:
                seen = {"val_tokens_seen": int(state.tokens)}
                return (
                    some(state.model, place_batch=place) | seen | planned.consumed(int(state.step))
                )

            described = run(config, technique, fraction, point, text.vocab_size)
            steps = round(config.steps * fraction)
            data = lambda seed: rows.train(technique, steps, seed)
            return dataclasses.replace(described, data=data, evaluation=measure), every

        def train(trial: Trial) -> dict[str, Any]:
            assert trial.point is not None
            one, every = run_at(trial.point, trial.tuning)
            metrics = trial.fit(one, keep_model=True)
            with jax.set_mesh(mesh):
                metrics |= every(trial.model(one), last=True, place_batch=place)
            return metrics | {"teraflops": metrics["flops"] / 1e12}

        whole = fraction == 1.0
        return Arm(
            about=NAMES[technique] + ("" if whole else f", {100 * fraction:g} % of the budget"),
            train=train,
            against=name(("none", fraction)),
            start=Point(config.learning_rate, config.warmup) if whole else None,
            point_of=None if whole else name((technique, 1.0)),
        )

    def name(key: tuple[Technique, float]) -> str:
        return f"{key[0]}_{100 * key[1]:g}"

    fractions = sorted(config.fractions, reverse=True)
    keys = list(itertools.product(get_args(Technique), fractions))
    keys.sort(key=lambda key: -key[1])
    loss = "validation loss (nats per token)"
    whole = tuple(name((technique, 1.0)) for technique in get_args(Technique))
    return Study(
        name="data_efficiency",
        data=text.digests(),
        arms={name(key): arm(*key) for key in keys},
        baseline="none_100",
        search=config.search,
        columns={"updates": "updates", **{cost: cost.replace("_", " ") for cost in COSTS}},
        plots=(
            Curves(
                name="curves",
                metric="val_loss",
                over="layer_tokens",
                arms=whole,
                labels=("layer-averaged tokens", loss),
            ),
            Curves(
                name="operations",
                metric="val_loss",
                over="flops",
                arms=whole,
                labels=("training operations", loss),
            ),
            Finals(name="budgets", label=loss),
        ),
        figures=lambda results: saved(config, results, text.vocab_size),
    )


def saved(config: Config, results: Results, vocab_size: int) -> dict[str, float | None]:
    """Return the smallest share of the baseline's costs with which each technique reaches the baseline's last loss.

    ``<technique>_<cost>_to_baseline``, over the fractions of the budget, by the mean of the evaluations; None if it never
    does. ``<technique>_<cost>_saved`` is one minus that.
    """
    if "none_100" not in results.study.arms:
        return {}
    start = Point(config.learning_rate, config.warmup)

    def curve(technique: Technique, fraction: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the mean loss at each evaluation, and the costs until there."""
        arm = f"{technique}_{100 * fraction:g}"
        steps, losses = curves_of(results.records(arm), "val_loss")
        one = run(config, technique, fraction, start, vocab_size)
        stages = None if one.changes is None else one.changes.stages
        planned = plan(config, technique, fraction, vocab_size)
        consumed = [planned.consumed(int(step)) for step in steps]
        costs = {cost: np.array([c[cost] for c in consumed], float) for cost in COSTS[:3]}
        costs["teraflops"] = np.array([c["flops"] / 1e12 for c in consumed])
        places = [results.folder / arm / f"seed-{seed}" for seed in range(results.seeds)]
        costs["step_seconds"] = np.array(
            [np.mean([step_seconds(p, int(step), stages) for p in places]) for step in steps]
        )
        return losses.mean(axis=0), costs

    losses, whole = curve("none", 1.0)
    found: dict[str, float | None] = {}
    for technique in get_args(Technique):
        shares: dict[str, list[float]] = {cost: [] for cost in COSTS}
        for fraction in config.fractions:
            if f"{technique}_{100 * fraction:g}" not in results.study.arms:
                continue
            means, costs = curve(technique, fraction)
            for cost in COSTS:
                reached = cost_of_reaching(float(losses[-1]), means, costs[cost])
                if reached is not None:
                    shares[cost].append(reached / float(whole[cost][-1]))
        for cost, values in shares.items():
            least = min(values, default=None)
            found[f"{technique}_{cost}_to_baseline"] = least
            found[f"{technique}_{cost}_saved"] = None if least is None else 1 - least
    return found


main = functools.partial(command.main, PRESETS, study, __doc__ or "")

if __name__ == "__main__":
    main()
