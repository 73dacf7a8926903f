"""One compilation of the experiment ``scale``: a model's step, or its decoding of one token, on a mesh."""

import dataclasses
from typing import Literal

from effscale.experiments.scale.models import computing, known_model
from effscale.models import TransformerConfig
from effscale.models.config import Remat
from effscale.parallel import MeshConfig

Technique = Literal[
    "none", "random_ltd", "curriculum", "onebit_adam", "zero_one_adam", "onebit_lamb"
]
ONEBIT: tuple[Technique, ...] = ("onebit_adam", "zero_one_adam", "onebit_lamb")
SCHEDULED: tuple[Technique, ...] = ("random_ltd", "curriculum")
"""Techniques that go through stages, each with a program of its own."""

Weights = Literal["bfloat16", "int8", "int4", "binary"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program to compile."""

    model: str
    topology: str
    mesh: MeshConfig
    accumulate: int
    remat: Remat
    batch_size: int
    length: int
    """Tokens of a row, those that a curriculum leaves; in decoding, tokens in the cache."""
    technique: Technique = "none"
    kept: int | None = None
    """Tokens that the middle layers keep of a row, with random-LTD."""
    decode: Weights | None = None
    """What weights are while a token is decoded; None trains."""

    @property
    def name(self) -> str:
        """Tells it from the others of a run; also the name of a file."""
        mesh = "-".join(f"{n}{v}" for n, v in dataclasses.asdict(self.mesh).items() if v != 1)
        parts = [self.model, mesh or "one", f"length{self.length}"]
        if self.decode is not None:
            return "-".join([*parts, f"rows{self.batch_size}", "decode", self.decode])
        parts += [f"accumulate{self.accumulate}", self.remat]
        if self.technique != "none":
            parts.append(self.technique)
        if self.kept is not None:
            parts.append(f"kept{self.kept}")
        return "-".join(parts)

    @property
    def layout(self) -> str:
        """The mesh and what else divides the work, in words."""
        sizes = dataclasses.asdict(self.mesh).items()
        mesh = ", ".join(f"{name} {size}" for name, size in sizes if size != 1) or "one chip"
        batches = "1 batch" if self.accumulate == 1 else f"{self.accumulate} micro-batches"
        return f"{mesh}\n{batches}"

    def transformer(self) -> TransformerConfig:
        """The model, which computes in bfloat16."""
        return computing(known_model(self.model), remat=self.remat)
