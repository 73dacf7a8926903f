"""One compilation of ``effscale.plan``: a model's training step, or the decoding of one token, on a mesh."""

import dataclasses
from typing import Literal

from effscale.models import TransformerConfig
from effscale.models.config import Remat
from effscale.parallel import MeshConfig
from effscale.plan.models import computing, known_model

Technique = Literal[
    "none", "random_ltd", "curriculum", "onebit_adam", "zero_one_adam", "onebit_lamb"
]
ONEBIT: tuple[Technique, ...] = ("onebit_adam", "zero_one_adam", "onebit_lamb")
SCHEDULED: tuple[Technique, ...] = ("random_ltd", "curriculum")
"""Techniques that go through stages, each with a separate program."""

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
    """Sequence length, after cutting by a curriculum; in decoding, number of tokens in the cache."""
    technique: Technique = "none"
    kept: int | None = None
    """Number of tokens per row that the middle layers keep, with random-LTD."""
    decode: Weights | None = None
    """Format of the weights for decoding; None compiles a training step."""

    @property
    def name(self) -> str:
        """A unique name within a run; also used as a file name."""
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
        """A description of the mesh and of the other ways the work is split."""
        sizes = dataclasses.asdict(self.mesh).items()
        mesh = ", ".join(f"{name} {size}" for name, size in sizes if size != 1) or "one chip"
        batches = "1 batch" if self.accumulate == 1 else f"{self.accumulate} micro-batches"
        return f"{mesh}\n{batches}"

    def transformer(self) -> TransformerConfig:
        """Return the model, which computes in bfloat16."""
        return computing(known_model(self.model), remat=self.remat)
