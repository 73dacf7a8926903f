"""What the experiment ``scale`` can be told, and its presets."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import get_args

from effscale.experiments.scale.machines import machine
from effscale.experiments.shared.config_parts import OutputPart
from effscale.models import PRESETS as MODELS
from effscale.models import TransformerConfig, preset
from effscale.models.config import Remat
from effscale.models.validation import check, did_you_mean
from effscale.parallel import MeshConfig

NAMES = {"bloom-176b": "bloom"}
"""Names of models beside those of `effscale.models.PRESETS`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One step to compile."""

    model: str
    topology: str
    mesh: MeshConfig
    accumulate: int
    remat: Remat
    batch_size: int
    length: int

    @property
    def name(self) -> str:
        """Tells it from the others of a run; also the name of a file."""
        mesh = "-".join(f"{n}{v}" for n, v in dataclasses.asdict(self.mesh).items() if v != 1)
        return f"{self.model}-{mesh or 'one'}-accumulate{self.accumulate}-{self.remat}"

    def transformer(self) -> TransformerConfig:
        """The model, which computes in bfloat16."""
        config = preset(NAMES.get(self.model, self.model))
        return dataclasses.replace(config, dtype="bfloat16", remat=self.remat)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OutputPart):
    """What is compiled; every field is an option of the command line. Where several values are given, all their combinations are compiled and compared."""

    model: tuple[str, ...] = ("bloom-176b",)
    """Models by name: bloom-176b, bloom-560m, gpt3-1.3b, gpt3-175b, opt-66b and the other causal language models of effscale.models.PRESETS."""
    topology: str = "v5p:8x8x8"
    """The machine: a TPU's kind and sides such as v5p:8x8x8, or a number of GPUs such as 384xH100."""
    batch_size: int = 2048
    """Rows of a step."""
    length: int = 2048
    """Tokens of a row."""
    data: tuple[int, ...] = (1,)
    """Replicas of the model, along the mesh axis data."""
    tensor: tuple[int, ...] = (4,)
    """Devices that split each layer, along the mesh axis tensor; the rest lie along fsdp."""
    accumulate: tuple[int, ...] = (2,)
    """Micro-batches of a step: more of them need less memory, and send weights more often."""
    remat: tuple[Remat, ...] = ("full",)
    """What the backward pass computes again in place of keeping it."""
    tokens: float = 366e9
    """Tokens of a whole training, whose days are told; BLOOM read 366 billion."""

    def __post_init__(self):
        super().__post_init__()
        chips = machine(self.topology).count  # an unknown one is refused here
        for name in self.model:
            known = {**MODELS, **NAMES}
            check(self, name in known, "model", f"a known one: {did_you_mean(name, known)}")
            model = preset(NAMES.get(name, name))
            language = model.causal and any(head.name == "lm" for head in model.heads)
            check(self, language, "model", "causal language models")
            limit = math.inf if model.max_length is None else model.max_length
            check(self, self.length <= limit, "length", f"at most {limit}, the positions of {name}")
        for name in ("batch_size", "length"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        for name in ("model", "data", "tensor", "accumulate", "remat"):
            check(self, len(getattr(self, name)) >= 1, name, "at least one")
        for kind in self.remat:
            check(self, kind in get_args(Remat), "remat", f"one of {get_args(Remat)}")
        for name in ("data", "tensor", "accumulate"):
            check(self, min(getattr(self, name)) >= 1, name, "at least 1")
        for data, tensor in itertools.product(self.data, self.tensor):
            wanted = f"such that data * tensor divides the {chips} chips of {self.topology}"
            check(self, chips % data == 0, "data", wanted)
            check(self, chips % (data * tensor) == 0, "tensor", wanted)
        for count in self.accumulate:
            wanted = f"a divisor of batch_size={self.batch_size}"
            check(self, self.batch_size % count == 0, "accumulate", wanted)
            for tensor in self.tensor:
                rows, devices = self.batch_size // count, chips // tensor
                wanted = f"such that {rows} rows can be divided among {devices} devices"
                check(self, rows % devices == 0, "accumulate", wanted)
        check(self, 0 < self.tokens < math.inf, "tokens", "above 0")

    def cases(self) -> Iterator[Case]:
        """All combinations."""
        chips = machine(self.topology).count
        given = (self.model, self.data, self.tensor, self.accumulate, self.remat)
        for model, data, tensor, accumulate, remat in itertools.product(*given):
            yield Case(
                model=model,
                topology=self.topology,
                mesh=MeshConfig(data=data, fsdp=chips // (data * tensor), tensor=tensor),
                accumulate=accumulate,
                remat=remat,
                batch_size=self.batch_size,
                length=self.length,
            )


PRESETS = {
    "smoke": Config(
        model=("gpt2",),
        topology="v5e:2x4",
        batch_size=8,
        length=256,
        tensor=(1,),
        accumulate=(1,),
        tokens=1e9,
    ),
    "default": Config(),
}
PRESETS["paper"] = PRESETS["default"]
FREE = ("out", "resume", "tokens")
"""What may differ when a run is resumed."""
