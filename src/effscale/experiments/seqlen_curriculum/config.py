"""What the experiment ``seqlen_curriculum`` can be told, and its presets."""

import dataclasses
import pathlib

from effscale.experiments.shared.config_parts import CorporaPart
from effscale.experiments.shared.gpt import ModelConfig
from effscale.models.validation import check
from effscale.parallel import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(CorporaPart):
    """What the run does; every field is an option of the command line."""

    tokenizer: pathlib.Path | None = None
    """A tokenizer.json, or its folder, to use instead of training one."""
    length: int = 128
    """Tokens in a full row, and positions of the model."""
    tokens: int = 750_000
    """Training tokens of each run."""
    batch_size: int = 4
    """Rows of the small batch, over all devices."""
    batch_factor: int = 8
    """Rows of the large batch, as a multiple."""
    micro_batch: int | None = None
    """Rows of the parts that a batch is cut into, to save memory; None takes it whole."""
    learning_rate: float = 1e-3
    """Peak of the small batch's learning rate: it rises by steps and falls by tokens, along a cosine to a tenth."""
    learning_rate_factors: tuple[float, ...] = (4.0, 16.0)
    """Peaks of the large batch's learning rate, as multiples. The figures are drawn of the first."""
    warmup: int = 10
    """Steps in which the learning rate rises, of each run."""
    curriculum: float = 1.2
    """Steps after which rows are whole, as a multiple of those that the large batch takes without a curriculum. They must become whole before the tokens are used up."""
    min_length: int = 8
    """Tokens in a row at the curriculum's first step."""
    granularity: int | None = None
    """Lengths are multiples of it, and each is a compilation; None makes about a dozen lengths."""
    model: ModelConfig = ModelConfig(d_model=128)
    """The model."""
    clip_norm: float = 1.0
    """Greatest norm of the gradient."""
    threshold: float = 1.2
    """A step is unstable if its loss is above the least before it by more than this factor."""
    mesh: MeshConfig = MeshConfig()
    """How devices are laid out; -1 means the rest."""
    evaluations: int = 16
    """Evaluations in each run, about; each is followed by a checkpoint."""
    eval_batches: int = 4
    """Held-out batches of an evaluation, with the rows of the large batch: the same ones each time."""
    seeds: int = 3
    """Runs of each kind; seeds 0, 1, ... decide initial weights and the order of data."""
    out: pathlib.Path | None = None
    """Folder of the run; by default runs/seqlen_curriculum/<time>."""

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
        enough = f"at least {least:,}, for the large batch to outlast its warmup"
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
        self.model.build(self.vocab_size, self.length)  # an impossible model is refused here


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
    # Li et al., 2021: GPT-2 with 1558M parameters; batches of 512 rows at 1.5e-4, and of 4096 at 6e-4 with 64 to 1024 tokens a
    # row over 45,000 steps, which is 1.2 times what 157B tokens make of such batches. Adam has no weight decay here either.
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

FREE = ("learning_rate_factors", "threshold", "seeds", "out", "resume", "cache")
