"""Config and presets of the experiment ``seqlen_curriculum``."""

import dataclasses
import pathlib

from effscale.experiments.shared.config_parts import CorporaPart
from effscale.experiments.shared.gpt import ModelConfig
from effscale.options import check
from effscale.parallel import MeshConfig
from effscale.study.folder import OUTPUT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(CorporaPart):
    """Options of a run; every field is a command-line option."""

    tokenizer: pathlib.Path | None = None
    """A tokenizer.json or its folder, to use instead of training a tokenizer."""
    length: int = 128
    """Full sequence length: tokens per row, and positions of the model."""
    tokens: int = 750_000
    """Number of training tokens per run."""
    batch_size: int = 4
    """Rows per small batch, over all devices."""
    batch_factor: int = 8
    """Rows per large batch, as a multiple of the small batch."""
    micro_batch: int | None = None
    """Rows per micro-batch, to save memory; None does not split the batch."""
    learning_rate: float = 1e-3
    """Peak learning rate of the small batch: it warms up by steps and decays by tokens, along a cosine to a tenth."""
    learning_rate_factors: tuple[float, ...] = (4.0, 16.0)
    """Peak learning rates of the large batch, as multiples of the small batch's. The figures show the first."""
    warmup: int = 10
    """Warmup steps of each run."""
    curriculum: float = 1.2
    """Number of steps until rows reach the full length, as a multiple of the large batch's steps without a curriculum.
    Rows must reach the full length before the tokens are used up."""
    min_length: int = 8
    """Sequence length at the curriculum's first step."""
    granularity: int | None = None
    """Lengths are multiples of this, and each one costs a compilation; None gives about a dozen lengths."""
    model: ModelConfig = ModelConfig(d_model=128)
    """The model."""
    clip_norm: float = 1.0
    """Maximum norm of the gradient; larger gradients are clipped."""
    threshold: float = 1.2
    """A step is unstable if its loss exceeds the lowest loss before it by more than this factor."""
    mesh: MeshConfig = MeshConfig()
    """Device mesh: the size of each axis; -1 means all remaining devices."""
    evaluations: int = 16
    """Approximate number of evaluations per run; each is followed by a checkpoint."""
    eval_batches: int = 4
    """Number of held-out batches per evaluation, with the size of the large batch; the same ones each time."""
    seeds: int = 3
    """Number of runs per arm. Seeds 0, 1, ... decide the initial weights and the order of data."""
    out: pathlib.Path | None = None
    """Run folder; the default is runs/seqlen_curriculum/<time>."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("length", "batch_size", "warmup", "evaluations", "eval_batches", "seeds"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        check(self, self.batch_factor >= 2, "batch_factor", "at least 2")
        part = self.micro_batch
        divisor = f"a divisor of batch_size={self.batch_size}, or None"
        check(
            self,
            part is None or (part >= 1 and self.batch_size % part == 0),
            "micro_batch",
            divisor,
        )
        least = (self.warmup + 1) * self.batch_size * self.batch_factor * self.length
        enough = f"at least {least:,}, so that the large batch trains longer than its warmup"
        check(self, self.tokens >= least, "tokens", enough)
        check(self, self.learning_rate > 0, "learning_rate", "above 0")
        factors = self.learning_rate_factors
        wanted = "one or more different numbers above 0"
        good = len(factors) >= 1 and len(set(factors)) == len(factors) and min(factors) > 0
        check(self, good, "learning_rate_factors", wanted)
        check(self, self.curriculum > 0, "curriculum", "above 0")
        shorter = f"from 1 to below length={self.length}"
        check(self, 1 <= self.min_length < self.length, "min_length", shorter)
        step = self.granularity
        check(self, step is None or step >= 1, "granularity", "at least 1, or None")
        check(self, self.clip_norm > 0, "clip_norm", "above 0")
        check(self, self.threshold > 1, "threshold", "above 1")
        self.model.build(self.vocab_size, self.length)  # raises for an invalid model


PRESETS = {
    "smoke": Config(
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
        seeds=1,
    ),
    "default": Config(),
    # Li et al., 2021: GPT-2 with 1558M parameters; batches of 512 rows at 1.5e-4, and of 4096 rows at 6e-4 with 64 to
    # 1024 tokens per row over 45,000 steps, which is 1.2 times the number of such batches in 157B tokens. Adam has no
    # weight decay here either.
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
        mesh=MeshConfig(fsdp=8),
        evaluations=150,
        eval_batches=2,
    ),
}

FREE = ("learning_rate_factors", "threshold", "seeds", *OUTPUT, "cache")
