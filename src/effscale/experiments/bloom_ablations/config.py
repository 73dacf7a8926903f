"""Config and presets of the experiment ``bloom_ablations``."""

import dataclasses
import math
import pathlib
from typing import Literal

from effscale.command.folder import OUTPUT
from effscale.experiments.shared.gpt import ModelConfig
from effscale.experiments.shared.pretraining_config import PretrainingConfig, PretrainingPart
from effscale.models import TransformerConfig, bloom
from effscale.models.config import TokenInputs
from effscale.models.positions import LearnedPositions, Rotary
from effscale.options import check
from effscale.study.search import Point, Search

ArmName = Literal["alibi", "rotary", "learned", "alibi_without_norm"]
ARMS: tuple[ArmName, ...] = ("alibi", "rotary", "learned", "alibi_without_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmModel(ModelConfig):
    """A BLOOM, or a variant with another position encoding or without the norm after the embedding."""

    arm: ArmName = "alibi"
    """The variant of the model."""
    longest: int = 512
    """Number of positions in the learned table, which must cover the longest evaluation rows."""

    def build(self, vocab_size: int, length: int) -> TransformerConfig:
        """Return the config of the transformer."""
        config = bloom(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads,
            vocab_size=vocab_size,
            dropout=self.dropout,
        )
        positions = {"rotary": Rotary(), "learned": LearnedPositions(num=max(length, self.longest))}
        inputs = config.inputs
        if self.arm == "alibi_without_norm":
            assert isinstance(inputs, TokenInputs)
            inputs = dataclasses.replace(inputs, norm=None)
        return dataclasses.replace(
            config,
            positions=positions.get(self.arm, config.positions),
            inputs=inputs,
            dtype=self.dtype,
            remat=self.remat,
            init_std=self.init_std,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PretrainingPart):
    """Options of a run; every field is a command-line option."""

    arms: tuple[ArmName, ...] = ARMS
    """Variants to compare; must include alibi, which is BLOOM itself."""
    seeds: int = 3
    """Number of runs per arm. Seeds 0, 1, ... decide the initial weights and the order of rows."""
    corpus: str = "stdlib"
    """The corpus: stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field or hf:NAME_OR_FOLDER#field."""
    vocab_size: int = 1024
    length: int = 64
    """Sequence length: tokens per training row."""
    times_longer: tuple[int, ...] = (1, 2, 4, 8)
    """Lengths of the evaluation rows, as multiples of the training length."""
    batch_size: int = 16
    steps: int = 500
    """Optimizer steps per run."""
    model: ModelConfig = ModelConfig(
        num_layers=4, d_model=128, num_heads=4, remat="none", init_std=0.051
    )
    """The model; each arm changes one thing. The standard deviation of the initial weights is sqrt(1 / (3 d_model))."""
    learning_rate: float = 4e-3
    """Peak learning rate at the start of each arm's search: a linear warmup, then a cosine."""
    warmup: int = 40
    """Warmup steps at the start of the search."""
    search: Search = Search(learning_rate_factor=2.0, points=5)
    """The search for each arm's learning rate and warmup."""
    eval_batches: int = 12
    """Number of held-out batches per length; the evaluation at the end of a run uses all."""
    eval_every: int = 100
    """Steps between evaluations."""
    checkpoint_every: int = 200
    out: pathlib.Path | None = None
    """Run folder; the default is runs/bloom_ablations/<time>."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("seeds", "steps", "eval_batches", "eval_every"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        check(self, len(set(self.arms)) == len(self.arms), "arms", "different arms")
        check(self, "alibi" in self.arms, "arms", "alibi and other arms to compare with it")
        longer = self.times_longer
        rises = all(n >= 1 for n in longer) and list(longer) == sorted(set(longer))
        check(
            self, rises and 1 in longer, "times_longer", "increasing whole numbers starting with 1"
        )
        check(self, 0 < self.learning_rate < math.inf, "learning_rate", "above 0 and finite")
        check(self, 0 <= self.warmup < self.steps, "warmup", f"from 0 to below steps={self.steps}")
        self.search.check_apart(self.seeds)
        for arm in self.arms:
            self.pretraining(arm)  # raises for an invalid run

    @property
    def start(self) -> Point:
        """The point where the search begins."""
        return Point(self.learning_rate, self.warmup)

    def pretraining(
        self, arm: ArmName, seed: int = 0, point: Point | None = None
    ) -> PretrainingConfig:
        """Return the config of one run, without its folder; if ``point`` is None, with the start of the search."""
        point = point or self.start
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(PretrainingPart)}
        sizes = {f.name: getattr(self.model, f.name) for f in dataclasses.fields(ModelConfig)}
        longest = max(self.times_longer) * self.length
        model = ArmModel(**sizes, arm=arm, longest=longest)
        return PretrainingConfig(
            **shared | {"out": None, "resume": False, "model": model},
            corpus=(self.corpus,),
            steps=self.steps,
            learning_rate=point.learning_rate,
            warmup=point.warmup,
            eval_every=self.eval_every,
            eval_batches=self.eval_batches,
            keep=1,
            seed=seed,
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
        checkpoint_every=4,
    ),
    "default": Config(),
    # The BLOOM paper compared positions with a model of 6.7 billion parameters on 300 billion tokens, and Le Scao et al., "What language model to train if you have one
    # million GPU hours?", 2022, with 1.3 billion on 112 billion tokens: this size, with their batch and rate.
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
        checkpoint_every=1000,
    ),
}

FREE = ("seeds", *OUTPUT, "cache", "mesh", "checkpoint_every")
"""Fields that can change when a run is resumed."""
