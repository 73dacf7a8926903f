"""Config and presets of the experiment ``random_ltd_bert``."""

import dataclasses
import pathlib

from effscale.experiments.shared.bert import ModelConfig
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.config_parts import PassagePart
from effscale.experiments.shared.random_ltd.arms import Dropping, LearningRate
from effscale.models.validation import check
from effscale.study.folder import OUTPUT
from effscale.study.search import Point, Search
from effscale.training import AdamWConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Early:
    """The first steps of both arms at a high learning rate."""

    seeds: int = 8
    """Number of runs per arm, with seeds 0, 1, ...; 0 skips this part."""
    steps: int = 200
    """Number of steps of each run; the schedule is that of a whole run, cut off here."""
    learning_rate: float = 3e-3
    """Peak learning rate."""

    def __post_init__(self):
        check(self, self.seeds >= 0, "seeds", "at least 0")
        check(self, self.steps >= 1, "steps", "at least 1")
        finite = 0 < self.learning_rate < float("inf")
        check(self, finite, "learning_rate", "above 0, and finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PassagePart):
    """Options of a run; every field is a command-line option."""

    seeds: int = 3
    """Number of runs per arm. Seeds 0, 1, ... decide the initial weights, the order of rows, which tokens are masked and which are kept."""
    vocab_size: int = 512
    """Vocabulary size of the byte-level BPE that is trained on the corpus; the mask token is added to it."""
    length: int = 128
    """Sequence length: tokens per row, and positions of the model."""
    batch_size: int = 16
    """Rows per batch."""
    accumulate: int = 1
    """Number of micro-batches that a batch is split into, to save memory."""
    steps: int = 600
    """Optimizer steps of pretraining."""
    hidden: float = 0.15
    """Fraction of the tokens to predict: 80 percent of them are masked, 10 percent replaced, 10 percent unchanged."""
    model: ModelConfig = ModelConfig()
    """The model."""
    ltd: Dropping = Dropping(min_value=32, seq_per_step=16, share=1.0)
    """Schedule of random-LTD; with share 1, no step keeps all tokens."""
    learning_rate: float = 1e-3
    """Peak learning rate at the start of the search: a linear warmup by steps, then a linear decay by layer tokens to a tenth."""
    warmup: float = 0.1
    """Fraction of the steps used for warmup, at the start of the search; fine-tuning uses this value."""
    search: Search = Search(learning_rate_factor=2.0, points=10)
    """The search for each arm's learning rate and warmup."""
    early: Early = Early()
    """The test of the first steps at a high learning rate."""
    out: pathlib.Path | None = None
    """Run folder; the default is runs/random_ltd_bert/<time>."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("length", "batch_size", "accumulate", "steps"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        divisor = f"a divisor of batch_size={self.batch_size}"
        check(self, self.batch_size % self.accumulate == 0, "accumulate", divisor)
        check(self, 0 < self.hidden < 1, "hidden", "between 0 and 1")
        check(self, self.learning_rate > 0, "learning_rate", "above 0, and finite")
        self.search.check_apart(self.seeds)
        within = self.early.seeds == 0 or self.early.steps <= self.steps
        check(self.early, within, "steps", f"at most the steps={self.steps} of a whole run")
        row = f"at most the {self.length} tokens of a row"
        check(self, self.passage <= self.length, "passage", row)
        # Raises for an invalid model or schedule.
        model = self.model.build(self.vocab_size, self.length)
        self.ltd.build(self.length, self.steps).check(model)

    @property
    def start(self) -> Point:
        """The point where the search begins."""
        return Point(self.learning_rate, round(self.warmup * self.steps))

    @staticmethod
    def rate(point: Point) -> LearningRate:
        """Return the learning rate with a peak and a warmup."""
        return LearningRate(
            peak=point.learning_rate, warmup=point.warmup, final=point.learning_rate / 10
        )


PRESETS = {
    "smoke": Config(
        seeds=1,
        vocab_size=512,
        length=64,
        batch_size=8,
        steps=16,
        model=ModelConfig(num_layers=3, d_model=32, num_heads=2),
        ltd=Dropping(min_value=16, seq_per_step=16, share=1.0),
        search=Search(learning_rate_factor=2.0, points=2),
        early=Early(seeds=2, steps=8),
        eval_every=8,
        eval_batches=2,
        classes=4,
        finetune=Recipe(epochs=2, batch_size=16, learning_rate=5e-3, train=128, test=64),
    ),
    "default": Config(),
    # Li et al., 2022: BERT-large, batches of 1024 rows, 2M steps with 10,000 of warmup, 128 to 512 tokens over all
    # steps; the settings of the task are from Devlin et al., 2018, appendix A.3.
    "paper": Config(
        vocab_size=30522,
        length=512,
        batch_size=1024,
        accumulate=16,
        steps=2_000_000,
        model=ModelConfig(
            num_layers=24, d_model=1024, num_heads=16, dropout=0.1, dtype="bfloat16", remat="full"
        ),
        ltd=Dropping(min_value=128, seq_per_step=16, share=1.0),
        learning_rate=1e-4,
        warmup=0.005,
        search=Search(points=1),
        early=Early(seeds=0),
        optimizer=AdamWConfig(b2=0.999, weight_decay=0.01),
        eval_every=10_000,
        eval_batches=20,
        passage=512,
        finetune=Recipe(epochs=3, batch_size=32, learning_rate=5e-5, train=1000, test=1000),
    ),
}

FREE = ("seeds", *OUTPUT, "cache")
