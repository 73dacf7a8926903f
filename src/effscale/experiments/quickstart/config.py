"""Config and presets of the experiment ``quickstart``."""

import dataclasses
import pathlib
from typing import Literal

from effscale.experiments.shared import pretraining_config
from effscale.experiments.shared.gpt import ModelConfig
from effscale.experiments.shared.pretraining_config import PretrainingConfig
from effscale.options import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PretrainingConfig):
    """Options of a run; every field is a command-line option."""

    on_error: Literal["raise", "skip"] | None = None
    """What to do with a document that cannot be used (unreadable, empty, not UTF-8): raise, or skip and count it.
    None uses the default of the source: skip for the standard library, raise for all others."""
    vocab_size: int = 2048
    samples: tuple[str, ...] = ("def read", "import ", "The ", "class Test")
    """Prompts for the trained model to continue."""
    sample_tokens: int = 80
    """Number of tokens of each continuation."""
    out: pathlib.Path | None = None
    """Run folder; the default is runs/quickstart/<time>."""

    def __post_init__(self):
        super().__post_init__()
        check(self, self.sample_tokens >= 1, "sample_tokens", "at least 1")


PRESETS = {
    "smoke": Config(
        steps=24,
        warmup=4,
        batch_size=4,
        length=64,
        vocab_size=512,
        model=ModelConfig(num_layers=2, d_model=64, num_heads=2),
        eval_every=12,
        eval_batches=2,
        checkpoint_every=12,
        sample_tokens=16,
    ),
    "default": Config(),
    # Radford et al., 2019: 124M parameters, 1024 positions, batches of 512 rows.
    "paper": Config(
        vocab_size=50257,
        length=1024,
        batch_size=512,
        accumulate=4,
        steps=600_000,
        warmup=2000,
        learning_rate=6e-4,
        model=ModelConfig(num_layers=12, d_model=768, num_heads=12, dtype="bfloat16", remat="full"),
        eval_every=1000,
        eval_batches=20,
        checkpoint_every=1000,
    ),
}

FREE = (*pretraining_config.FREE, "samples", "sample_tokens")
