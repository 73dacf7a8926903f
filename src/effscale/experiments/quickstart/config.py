"""What the experiment ``quickstart`` can be told, and its presets."""

import dataclasses
import pathlib
from typing import Literal

import optax

from effscale.experiments.shared.gpt import ModelConfig
from effscale.experiments.shared.pretraining_plan import (
    CURRICULA,
    DataEfficiencyConfig,
    Plan,
    Technique,
    check_technique,
    make_plan,
)
from effscale.models.validation import check, check_finite, is_integer
from effscale.parallel import MeshConfig
from effscale.training import AdamWConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the run does; every field is an option of the command line."""

    corpus: tuple[str, ...] = ("stdlib",)
    """Sources, each [WEIGHT*]KIND: stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field, hf:NAME_OR_FOLDER#field."""
    on_error: Literal["raise", "skip"] | None = None
    """What a document that cannot be used (unreadable, empty, not UTF-8) is: an error, or a counted skip; None leaves it to
    the source, which raises except for the standard library's."""
    vocab_size: int = 2048
    """Size of the byte-level BPE that is trained on the corpus."""
    tokenizer: pathlib.Path | None = None
    """A tokenizer.json, or its folder, to use instead of training one."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out."""
    length: int = 256
    """Tokens in a row, and positions of the model."""
    batch_size: int = 16
    """Rows in a batch, over all devices."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into, to save memory."""
    steps: int = 240
    """Batches to train on. A technique makes more and smaller ones of them, with as many tokens, averaged over the layers."""
    technique: Technique = "none"
    """Curriculum learning (cl: rows of frequent tokens and short rows first), random-LTD (ltd: middle layers see some of
    the tokens) or both."""
    efficiency: DataEfficiencyConfig = DataEfficiencyConfig()
    """The schedules of the technique."""
    model: ModelConfig = ModelConfig()
    """The model."""
    learning_rate: float = 3e-3
    """Peak of the schedule: a linear warmup by steps, then a cosine by tokens."""
    final_learning_rate: float | None = None
    """End of the schedule; None takes a tenth of the peak."""
    warmup: int = 30
    """Steps of warmup, whatever a technique makes of their batches."""
    optimizer: AdamWConfig = AdamWConfig()
    """AdamW."""
    clip_norm: float = 1.0
    """Greatest norm of the gradient."""
    mesh: MeshConfig = MeshConfig()
    """How devices are laid out; -1 means the rest."""
    eval_every: int = 60
    """Steps between evaluations on a part of the held-out text, whose loss is part_val_loss; at the end, val_loss is that on all of it."""
    eval_batches: int = 6
    """Batches in that part."""
    checkpoint_every: int = 60
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints to keep."""
    samples: tuple[str, ...] = ("def read", "import ", "The ", "class Test")
    """Prompts that the trained model continues."""
    sample_tokens: int = 80
    """Tokens of each continuation."""
    seed: int = 0
    """Decides the split, the order of data, the initial weights and the samples."""
    out: pathlib.Path | None = None
    """Folder of the run; by default runs/quickstart/<time>."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint, exactly as if it had not stopped."""
    cache: pathlib.Path | None = None
    """Where prepared corpora are kept; by default the user's cache folder."""

    def __post_init__(self):
        check_finite(self)
        check(self, len(self.corpus) >= 1, "corpus", "at least one source")
        check(self, 0 < self.validation_fraction < 1, "validation_fraction", "between 0 and 1")
        check(self, self.clip_norm > 0, "clip_norm", "above 0")
        check(self, is_integer(self.seed) and self.seed >= 0, "seed", "an integer, 0 or above")
        for name in (
            "length",
            "batch_size",
            "accumulate",
            "steps",
            "eval_every",
            "eval_batches",
            "checkpoint_every",
            "keep",
            "sample_tokens",
        ):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        check(
            self,
            self.batch_size % self.accumulate == 0,
            "accumulate",
            f"a divisor of batch_size={self.batch_size}",
        )
        # An impossible model or technique is refused here.
        model = self.model.build(self.vocab_size, self.length)
        check_technique(
            self.technique, self.efficiency, model, steps=self.steps, length=self.length
        )
        if self.technique in CURRICULA:
            wanted = "one source, whose rows a curriculum orders"
            check(self, len(self.corpus) == 1, "corpus", wanted)
        check(self, 0 <= self.warmup < self.steps, "warmup", f"from 0 to below steps={self.steps}")
        check(self, 0 < self.learning_rate < float("inf"), "learning_rate", "above 0, and finite")
        final = self.final_learning_rate
        check(
            self,
            final is None or 0 <= final <= self.learning_rate,
            "final_learning_rate",
            f"from 0 to learning_rate={self.learning_rate}, or None",
        )
        check(
            self,
            not (self.resume and self.out is None),
            "resume",
            "given with --out, the folder to go on with",
        )

    def schedule(self) -> optax.GradientTransformationExtraArgs:
        """The learning rate, the optimizer's last link: it warms up by steps and decays by layer-averaged tokens.

        Its numbers are a part of the optimizer's state, so that one compiled step serves all of them.
        """
        from effscale.curriculum import steps_then_tokens

        final = self.final_learning_rate
        return optax.inject_hyperparams(steps_then_tokens, static_args="kind")(
            peak=self.learning_rate,
            warmup_steps=self.warmup,
            total_tokens=float(self.steps * self.batch_size * self.length),
            final=self.learning_rate / 10 if final is None else final,
        )

    def plan(self, vocab_size: int) -> Plan:
        """The shapes of the run and its number of steps."""
        return make_plan(
            self.technique,
            self.efficiency,
            self.model.build(vocab_size, self.length),
            steps=self.steps,
            batch_size=self.batch_size,
            length=self.length,
        )


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

FREE = (
    "out",
    "resume",
    "cache",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
    "keep",
    "samples",
    "sample_tokens",
    "mesh",
)
