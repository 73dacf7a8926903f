"""Compare dense models, mixtures of experts and their students, trained on real text for the same number of steps.

A mixture of experts with one expert per token computes as much as a dense model, and has several times its
parameters. The experiment measures how much lower its loss is, and how much longer a dense model must train to reach
it.

It also tests four observations of the paper. Are experts worth more in later layers? Is a dense feed-forward plus one
expert as good as two experts? Is a pyramid of residual experts as good as using its largest number of experts
everywhere, with fewer parameters? Is a shallower student, distilled until before the end, as good as its teacher? The
operations of each arm are counted.

    python -m effscale.experiments.moe
    python -m effscale.experiments.moe --arms dense moe --num-experts 16
    python -m effscale.experiments.moe --out runs/mine --resume

The default corpus is the standard library of the running Python, so nothing is downloaded.

References:
    Rajbhandari et al., "DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI
        Scale" (2022), sections 4 and 5. https://arxiv.org/abs/2201.05596
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
from flax import nnx

from effscale.data import unigram_entropy
from effscale.experiments.shared.config_parts import CorporaPart
from effscale.experiments.shared.gpt import ModelConfig
from effscale.experiments.shared.prepared import Text, prepared_corpora
from effscale.ltd import training_flops
from effscale.models import MLPConfig, Transformer, TransformerConfig
from effscale.moe import MoEConfig, RouterConfig, mixture_of_students_loss, with_experts
from effscale.moe.students import leaving_teacher
from effscale.options import Bounds, NonNegativeInt, PositiveFloat, PositiveInt, check
from effscale.run import Run
from effscale.study import Arm, Curves, Finals, Results, Study, Trial, command
from effscale.study.folder import StudyPart
from effscale.training import AdamWConfig, Clip, ScheduleConfig, next_token_loss


class Kind(NamedTuple):
    """What distinguishes an arm."""

    about: str
    """Description of the model in tables and figures."""
    where: Literal["none", "every_second", "first_half", "second_half", "pyramid"] = "every_second"
    """Which layers have experts. A pyramid has twice as many experts in the last sixth of these layers, like 350M+PR-MoE-32/64 in two of
    twelve."""
    times: int = 1
    """Number of steps, as a multiple of that of the other arms."""
    experts: int = 1
    """Number of experts, as a multiple of ``Config.num_experts``."""
    k: int = 1
    """Number of experts per token."""
    residual: bool = False
    """A dense part in addition to the experts."""
    student: bool = False
    """Use fewer layers, ``Config.student_layers``."""
    teacher: str | None = None
    """The arm that it learns from."""
    leaves: bool = False
    """Stop distillation after ``Config.teacher_leaves`` of the steps."""


_PYRAMID: dict[str, Any] = {"where": "pyramid", "residual": True}
_STUDENT: dict[str, Any] = {**_PYRAMID, "student": True}
KINDS: dict[str, Kind] = {
    "dense": Kind("dense", where="none"),
    "dense_2x": Kind("dense, twice the steps", where="none", times=2),
    "dense_4x": Kind("dense, four times the steps", where="none", times=4),
    "moe": Kind("experts in every second layer"),
    "moe_double": Kind("twice as many experts", experts=2),
    "top2": Kind("two experts per token", k=2),
    "residual": Kind("one expert and a dense part", residual=True),
    "first_half": Kind("experts in the first half", where="first_half"),
    "second_half": Kind("experts in the second half", where="second_half"),
    "pr_moe": Kind("residual pyramid", **_PYRAMID),
    "pr_moe_student": Kind("student without a teacher", **_STUDENT),
    "pr_moe_kd": Kind("student, the teacher stays", teacher="pr_moe", **_STUDENT),
    "pr_moe_mos": Kind("student, the teacher leaves", teacher="pr_moe", leaves=True, **_STUDENT),
}

PAIRS = (
    ("moe", "dense", "experts in every second layer, against none"),
    ("second_half", "first_half", "experts in the second half of the layers, against the first"),
    ("residual", "top2", "one expert and a dense part, against two experts"),
    ("moe_double", "moe", "twice as many experts, against the plain mixture"),
    ("pr_moe", "residual", "a residual pyramid, against the same number everywhere"),
    ("pr_moe", "moe_double", "a residual pyramid, against its largest number everywhere"),
    ("pr_moe_student", "pr_moe", "a student without a teacher, against the full pyramid"),
    ("pr_moe_kd", "pr_moe_student", "a teacher that stays, against none"),
    ("pr_moe_mos", "pr_moe_student", "a teacher that leaves, against none"),
    ("pr_moe_mos", "pr_moe_kd", "a teacher that leaves, against one that stays"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StudyPart, CorporaPart):
    """Options of the study; every field is a command-line option."""

    steps: PositiveInt = 600
    """Optimizer steps; dense_2x and dense_4x take two and four times as many."""
    length: PositiveInt = 128
    """Sequence length: tokens per row, and positions of the model."""
    batch_size: PositiveInt = 16
    """Rows per batch."""
    accumulate: PositiveInt = 1
    """Number of micro-batches that a batch is split into, to save memory; expert capacity is shared by the tokens of each micro-batch."""
    model: ModelConfig = ModelConfig(num_layers=6, d_model=96, remat="none")
    """The dense model; each expert has the size of its feed-forward."""
    num_experts: Annotated[int, Bounds(at_least=2)] = 8
    """Experts per layer with experts; the last such layers of a pyramid have twice as many."""
    router: RouterConfig = RouterConfig(capacity_factor=1.25, eval_capacity_factor=2.0)
    """The router; ``k`` is set by each arm."""
    student_layers: int = 4
    """Number of layers of the students."""
    teacher_leaves: Annotated[float, Bounds(above=0, below=1)] = 0.7
    """Fraction of the steps after which pr_moe_mos trains without its teacher; in the paper, about 400,000 of 570,000."""
    dense_rate: PositiveFloat = 8e-3
    """Peak learning rate of dense models: the best of 2e-3, 4e-3, ... on the first seed."""
    moe_rate: PositiveFloat = 4e-3
    """Peak learning rate of models with experts, found in the same way."""
    warmup: NonNegativeInt = 60
    """Warmup steps, the same for all arms; then the learning rate decays along a cosine to a tenth."""
    vocab_size: PositiveInt = 512
    """Vocabulary size of the byte-level BPE that is trained on the corpus."""
    eval_every: PositiveInt = 100
    """Steps between evaluations on part of the held-out text, and between checkpoints; the last evaluation is on all of it."""
    eval_batches: PositiveInt = 20
    """Number of batches in that part."""

    def __post_init__(self):
        super().__post_init__()
        divisor = f"a divisor of batch_size={self.batch_size}"
        check(self, self.batch_size % self.accumulate == 0, "accumulate", divisor)
        check(self, self.warmup < self.steps, "warmup", f"below steps={self.steps}")
        check(self, self.model.num_layers >= 2, "model", "a model with at least 2 layers")
        fewer = 2 <= self.student_layers <= self.model.num_layers
        check(self, fewer, "student_layers", f"from 2 to num_layers={self.model.num_layers}")
        for name in KINDS:
            transformer(self, name, self.vocab_size)  # raises for an invalid model


def expert_counts(kind: Kind, num_layers: int, num_experts: int) -> list[int]:
    """Return the number of experts of each layer; 0 for a dense layer.

    Example:
        >>> expert_counts(KINDS["pr_moe"], 6, 8)
        [0, 8, 0, 8, 0, 16]
        >>> expert_counts(KINDS["second_half"], 6, 8)
        [0, 0, 0, 8, 8, 8]
    """
    counts = [0] * num_layers
    num_experts = num_experts * kind.experts
    if kind.where in ("every_second", "pyramid"):
        places = range(1, num_layers, 2)
        more = max(1, round(len(places) / 6)) if kind.where == "pyramid" else 0
        for number, place in enumerate(places):
            last = number >= len(places) - more
            counts[place] = num_experts * (2 if last else 1)
    elif kind.where != "none":
        half = num_layers // 2
        places = range(half) if kind.where == "first_half" else range(num_layers - half, num_layers)
        for i in places:
            counts[i] = num_experts
    return counts


def transformer(config: Config, name: str, vocab_size: int) -> TransformerConfig:
    """Return the model of an arm."""
    kind, model = KINDS[name], config.model
    if kind.student:
        model = dataclasses.replace(model, num_layers=config.student_layers)
    dense = model.build(vocab_size, config.length)
    counts = expert_counts(kind, dense.num_layers, config.num_experts)
    if not any(counts):
        return dense
    expert = dense.blocks[0].feed_forward
    assert isinstance(expert, MLPConfig)
    moe = MoEConfig(
        num_experts=config.num_experts,
        expert=expert,
        router=dataclasses.replace(config.router, k=kind.k),
        shared=expert if kind.residual else None,
    )
    if kind.where in ("every_second", "pyramid"):
        return with_experts(dense, moe, counts[1::2])
    return with_experts(dense, moe, counts, every=1)


PRESETS = {
    "smoke": Config(
        arms=("dense", "moe", "pr_moe", "pr_moe_mos"),
        seeds=1,
        steps=20,
        warmup=2,
        length=32,
        batch_size=8,
        model=ModelConfig(num_layers=2, d_model=32, num_heads=2, remat="none"),
        num_experts=4,
        student_layers=2,
        eval_every=10,
        eval_batches=2,
    ),
    # dense_4x is for mixtures whose loss dense_2x does not reach.
    "default": Config(arms=tuple(name for name in KINDS if name != "dense_4x")),
    # 350M+PR-MoE-32/64 and its baselines, from DeepSpeed's scripts: 24 layers, width 1,024, 256 rows of 2,048 tokens,
    # 300B tokens, capacity factor 1. Students have 21 layers. Their learning rates end at 1e-6, here at a tenth of
    # the peak.
    "paper": Config(
        steps=572_000,
        warmup=715,
        length=2048,
        batch_size=256,
        accumulate=8,
        model=ModelConfig(
            num_layers=24,
            d_model=1024,
            num_heads=16,
            dtype="bfloat16",
            remat="full",
            init_std=0.014,
        ),
        num_experts=32,
        router=RouterConfig(),
        student_layers=21,
        dense_rate=3e-4,
        moe_rate=3e-4,
        vocab_size=50257,
        eval_every=5000,
    ),
}


def run(config: Config, name: str, text: Text | None = None) -> Run:
    """Return the run of an arm; without a text only to be lowered."""
    kind = KINDS[name]
    steps = config.steps * kind.times
    peak = config.dense_rate if kind.where == "none" else config.moe_rate
    rate = ScheduleConfig(peak=peak, warmup=config.warmup, total=steps, final=peak / 10)
    described = Run(
        model=transformer(config, name, text.vocab_size if text else config.vocab_size),
        loss=next_token_loss if kind.teacher is None else mixture_of_students_loss,
        optimizer=AdamWConfig(b2=0.95, weight_decay=0.1),
        learning_rate=rate.build(),
        clip=Clip(1.0),
        accumulate=config.accumulate,
        num_steps=steps,
        changes=leaving_teacher(teacher_steps(config, name)) if kind.leaves else None,
        checkpoint_every=config.eval_every,
    )
    return described if text is None else text.next_token_run(described, config)


def teacher_steps(config: Config, name: str) -> int:
    """Return the number of steps in which an arm learns from its teacher."""
    kind = KINDS[name]
    if kind.teacher is None:
        return 0
    steps = config.steps * kind.times
    return max(1, round(config.teacher_leaves * steps)) if kind.leaves else steps


def teraflops(config: Config, name: str, vocab_size: int) -> float:
    """Return the operations of a training: matrix products of both passes, and of the teacher's forward passes while it is used."""
    of = lambda arm: training_flops(transformer(config, arm, vocab_size), config.length)
    kind = KINDS[name]
    total = config.steps * kind.times * of(name)
    if kind.teacher is not None:
        total += teacher_steps(config, name) * of(kind.teacher) / 3
    return config.batch_size * total / 1e12


def count_params(model: TransformerConfig) -> int:
    """Count the parameters of a model without creating it."""
    shapes = jax.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes)))


def study(config: Config) -> Study:
    """Return the comparison."""
    text = Text(*prepared_corpora(config))
    runs = {name: run(config, name, text) for name in KINDS}

    def arm(name: str) -> Arm:
        kind = KINDS[name]
        costs = {
            "parameters": count_params(transformer(config, name, text.vocab_size)),
            "teraflops": teraflops(config, name, text.vocab_size),
        }

        def train(trial: Trial) -> dict[str, Any]:
            teacher = kind.teacher and (lambda: trial.model(runs[kind.teacher], arm=kind.teacher))
            keep = name == "pr_moe"
            return trial.fit(runs[name], frozen=teacher, keep_model=keep) | costs

        needs = () if kind.teacher is None else (kind.teacher,)
        return Arm(about=kind.about, train=train, needs=needs)

    curves = ("dense", "dense_2x", "moe", "first_half", "second_half", "pr_moe", "pr_moe_mos")
    labels = ("training compute (teraFLOPs)", "loss on part of the held-out text (nats per token)")
    return Study(
        name="moe",
        data=text.digests(),
        arms={name: arm(name) for name in KINDS},
        baseline="dense",
        columns={
            "parameters": "parameters",
            "updates": "updates",
            "tokens": "tokens",
            "teraflops": "teraFLOPs",
            "cpu_seconds": "processor seconds",
        },
        pairs=PAIRS,
        plots=(
            Finals(name="losses", label="final loss (nats per token)"),
            Curves(name="curves", over="teraflops", arms=curves, labels=labels),
        ),
        figures=lambda results: {
            "unigram_entropy": unigram_entropy(text.validation),
            **dense_over_mixture(results),
        },
    )


def dense_over_mixture(results: Results) -> dict[str, float | None]:
    """Return how many times the cost of the plain mixture dense models need for its loss; None if they do not reach it."""
    found: dict[str, float | None] = {}
    table = results.table
    for cost in ("teraflops", "cpu_seconds"):
        dense = [name for name in ("dense", "dense_2x", "dense_4x") if name in results.study.arms]
        if "moe" not in results.study.arms or len(dense) < 2:
            continue
        mean = lambda name, metric: table.interval(name, metric).mean
        costs = [mean(name, cost) for name in dense]
        losses = [mean(name, "val_loss") for name in dense]
        reached = cost_to_reach(mean("moe", "val_loss"), costs, losses)
        found[f"dense_{cost}_over_moe"] = reached and reached / mean("moe", cost)
    return found


def cost_to_reach(loss: float, costs: Sequence[float], losses: Sequence[float]) -> float | None:
    """Return the cost at which dense models reach a loss, interpolated between whole trainings of different lengths.

    The loss is assumed to be linear in the logarithm of the cost. None if the longest training does not reach the loss.

    Example:
        >>> cost_to_reach(2.5, [1.0, 4.0], [3.0, 2.0])
        2.0
    """
    known = list(zip(costs, losses, strict=True))
    for (cost, above), (more, below) in itertools.pairwise(known):
        if above >= loss >= below and above > below:
            share = (above - loss) / (above - below)
            return float(cost * (more / cost) ** share)
    return None


main = functools.partial(command.main, PRESETS, study, __doc__ or "")

if __name__ == "__main__":
    main()
