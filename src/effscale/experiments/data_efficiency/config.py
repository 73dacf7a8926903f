"""Config and presets of the experiment ``data_efficiency``."""

import dataclasses
import pathlib

from effscale.experiments.shared.gpt import ModelConfig
from effscale.experiments.shared.pretraining_config import PretrainingConfig, PretrainingPart
from effscale.experiments.shared.pretraining_plan import DataEfficiencyConfig, Technique
from effscale.models.validation import check
from effscale.parallel import MeshConfig
from effscale.study.folder import OUTPUT
from effscale.study.search import Point, Search


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PretrainingPart):
    """Options of a run; every field is a command-line option."""

    techniques: tuple[Technique, ...] = ("none", "cl", "ltd", "cl_ltd")
    """Techniques to compare; must include none, the baseline."""
    fractions: tuple[float, ...] = (1.0, 0.67, 0.5)
    """Fractions of the token budget; must include 1."""
    seeds: int = 3
    """Number of runs of each technique and fraction.
    Seeds 0, 1, ... decide the initial weights, the order of rows and which tokens are dropped."""
    efficiency: DataEfficiencyConfig = DataEfficiencyConfig()
    """The schedules of the techniques."""
    corpus: str = "stdlib"
    """The corpus: stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field or hf:NAME_OR_FOLDER#field."""
    validation_fraction: float = 0.03
    batch_size: int = 8
    steps: int = 400
    """Optimizer steps of the baseline on the whole budget, which is this number of full batches."""
    model: ModelConfig = ModelConfig(num_layers=6, d_model=128, num_heads=4, remat="none")
    learning_rate: float = 4.5e-3
    """Peak learning rate at the start of the search: a linear warmup by steps, then a cosine by layer-averaged tokens."""
    warmup: int = 160
    """Warmup steps at the start of the search. Runs on a fraction of the budget use that fraction of the warmup that it finds."""
    search: Search = Search()
    """The search for each technique's learning rate and warmup, on the whole budget."""
    evaluations: int = 10
    """Number of evaluations of the baseline on the whole budget, on part of the held-out rows; the last evaluation is on all rows."""
    eval_batches: int = 12
    """Number of batches in that part."""
    checkpoint_every: int = 200
    out: pathlib.Path | None = None
    """Run folder; the default is runs/data_efficiency/<time>."""

    def __post_init__(self):
        super().__post_init__()
        check(self, self.steps >= 1, "steps", "at least 1")
        for name in ("techniques", "fractions"):
            values = getattr(self, name)
            check(self, len(set(values)) == len(values), name, "different values")
        check(
            self,
            "none" in self.techniques,
            "techniques",
            "none and other techniques to compare with it",
        )
        check(
            self, all(0 < f <= 1 for f in self.fractions), "fractions", "numbers above 0, at most 1"
        )
        check(
            self, 1.0 in self.fractions, "fractions", "1.0 and other fractions to compare with it"
        )
        check(self, self.seeds >= 1, "seeds", "at least 1")
        self.search.check_apart(self.seeds)
        within = f"from 1 to steps={self.steps}"
        check(self, 1 <= self.evaluations <= self.steps, "evaluations", within)
        for technique in self.techniques:
            for fraction in self.fractions:
                self.pretraining(technique, fraction)  # raises for an invalid run

    @property
    def start(self) -> Point:
        """The point where the search begins."""
        return Point(self.learning_rate, self.warmup)

    def pretraining(
        self,
        technique: Technique,
        fraction: float,
        seed: int = 0,
        point: Point | None = None,
    ) -> PretrainingConfig:
        """Return the config of one run, without its folder; if ``point`` is None, with the start of the search."""
        point = point or self.start
        fields = dataclasses.fields(PretrainingPart)
        shared = {field.name: getattr(self, field.name) for field in fields}
        return PretrainingConfig(
            **shared | {"out": None, "resume": False},
            corpus=(self.corpus,),
            technique=technique,
            steps=round(self.steps * fraction),
            learning_rate=point.learning_rate,
            warmup=round(point.warmup * fraction),
            eval_every=self.steps // self.evaluations,
            eval_batches=self.eval_batches,
            keep=1,
            seed=seed,
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
    # The paper's GPT-3 1.3B: 300 billion tokens in batches of 512 rows; its lengths grow by 8 and 16 tokens, these by 128.
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
        final_learning_rate=1e-6,
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

FREE = ("seeds", "mesh", *OUTPUT, "cache")
