"""Config and presets of ``effscale.plan``."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import get_args

from effscale.command.folder import OUTPUT, OutputPart
from effscale.data_efficiency import DataEfficiencyConfig
from effscale.models.config import Remat
from effscale.options import check
from effscale.parallel import MeshConfig
from effscale.parallel.machines import machine
from effscale.plan.cases import ONEBIT, Case, Technique, Weights
from effscale.plan.models import check_mesh, known_model, num_experts
from effscale.plan.schedules import PAPER, stages_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OutputPart):
    """What to compile; every field is a command-line option. If several values are given, all combinations are compiled and compared."""

    model: tuple[str, ...] = ("bloom-176b",)
    """Models by name: bloom-176b, gpt3-1.3b, gpt3-1.3b-moe-128, gpt3-175b, opt-66b, bert-large and the other text models of effscale.models.PRESETS."""
    topology: str = "v5p:8x8x8"
    """The machine: a TPU generation and topology such as v5p:8x8x8, or a number of GPUs such as 384xH100."""
    batch_size: int = 2048
    """Rows per step at the first length; with longer rows there are fewer, so that a step has the same number of tokens."""
    length: tuple[int, ...] = (2048,)
    """Sequence length: tokens per row."""
    data: tuple[int, ...] = (1,)
    """Size of the mesh axis data: replicas of the model."""
    expert: tuple[int, ...] = (1,)
    """Size of the mesh axis expert: devices that hold different experts; for models without experts, they join fsdp."""
    tensor: tuple[int, ...] = (4,)
    """Size of the mesh axis tensor: devices that split each layer; all remaining devices are along fsdp."""
    accumulate: tuple[int, ...] = (2,)
    """Micro-batches per step: more of them need less memory, but send weights more often."""
    remat: tuple[Remat, ...] = ("full",)
    """What the backward pass recomputes instead of storing it."""
    technique: tuple[Technique, ...] = ("none",)
    """Techniques to compile: none, random_ltd, curriculum (of the sequence length), onebit_adam, zero_one_adam, onebit_lamb.
    Leave it empty to compile only decoding."""
    efficiency: DataEfficiencyConfig = PAPER
    """The schedules of random_ltd and curriculum."""
    points: int = 3
    """Number of stages of a schedule to compile, starting with the shortest; times between them are interpolated."""
    decode: tuple[Weights, ...] = ()
    """Weight formats for decoding: bfloat16, int8, int4 (in groups of 128), binary.
    Layers are then split along tensor, and all remaining devices are replicas along data."""
    decode_rows: int = 64
    """Rows that decode at the same time, over all devices; the cache holds length tokens of each."""
    tokens: float = 366e9
    """Tokens of a whole training, for the estimate in days; BLOOM was trained on 366 billion."""
    data_bandwidth: float | None = None
    """Bytes per second that a chip sends along data, if this axis spans slices or hosts: 6.25e9 for four chips on 200 Gb/s.
    None uses the same bandwidth as along the other axes."""

    def __post_init__(self):
        super().__post_init__()
        chips = machine(self.topology).count  # raises for an unknown topology
        for name in ("batch_size", "points", "decode_rows"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        for name in ("model", "length", "data", "expert", "tensor", "accumulate", "remat"):
            check(self, len(getattr(self, name)) >= 1, name, "at least one")
        for name in ("length", "data", "expert", "tensor", "accumulate"):
            check(self, min(getattr(self, name)) >= 1, name, "at least 1")
        for name, kinds in (("remat", Remat), ("technique", Technique), ("decode", Weights)):
            known = set(getattr(self, name)) <= set(get_args(kinds))
            check(self, known, name, f"names from {get_args(kinds)}")
        check(self, 0 < self.tokens < math.inf, "tokens", "above 0")
        bandwidth = self.data_bandwidth
        check(self, bandwidth is None or bandwidth > 0, "data_bandwidth", "above 0")
        self._check_work()
        for data, tensor, expert in itertools.product(self.data, self.tensor, self.expert):
            wanted = (
                f"such that data * tensor * expert divides the {chips} chips of {self.topology}"
            )
            for name, product in (
                ("data", data),
                ("tensor", data * tensor),
                ("expert", data * tensor * expert),
            ):
                check(self, chips % product == 0, name, wanted)
        for name in self.model:
            config, longest = known_model(name), max(self.length)
            limit = math.inf if config.max_length is None else config.max_length
            check(self, longest <= limit, "length", f"at most {limit}, the positions of {name}")
            check(
                self,
                config.causal or not self.decode,
                "decode",
                f"empty, because {name} is bidirectional",
            )
        for length in self.length:
            whole = self.batch_size * self.length[0] % length == 0
            check(self, whole, "length", f"divisors of a step's {self.step_tokens:,} tokens")
        for case in self.cases():
            self._check_case(case)

    def _check_work(self) -> None:
        check(self, bool(self.technique or self.decode), "technique", "set, unless decode is")
        with_none = not self.technique or "none" in self.technique
        check(self, with_none, "technique", "none and other techniques to compare with it")
        if set(self.technique) & set(ONEBIT):
            check(
                self,
                max(self.data) > 1,
                "data",
                "above 1 for 1-bit optimizers, whose workers it counts",
            )

    def _check_case(self, case: Case) -> None:
        sizes = dataclasses.asdict(case.mesh)
        check_mesh(case.model, known_model(case.model), sizes)
        if case.decode is not None:
            wanted = f"a multiple of the {case.mesh.data} replicas that decode"
            check(self, case.batch_size % case.mesh.data == 0, "decode_rows", wanted)
            return
        count, devices = case.accumulate, math.prod(sizes.values()) // case.mesh.tensor
        wanted = f"a divisor of the {case.batch_size} rows of a step"
        check(self, case.batch_size % count == 0, "accumulate", wanted)
        rows = case.batch_size // count
        wanted = f"such that {rows} rows can be divided among {devices} devices"
        check(self, rows % devices == 0, "accumulate", wanted)

    @property
    def step_tokens(self) -> int:
        """Tokens per step, with whole rows."""
        return self.batch_size * self.length[0]

    @property
    def steps(self) -> int:
        """Number of steps of a whole training on whole rows."""
        return max(1, round(self.tokens / self.step_tokens))

    def cases(self) -> Iterator[Case]:
        """Yield all combinations, each once."""
        yield from dict.fromkeys(self._cases())

    def _cases(self) -> Iterator[Case]:
        chips = machine(self.topology).count
        given = (self.model, self.length, self.data, self.tensor, self.expert)
        for model, length, data, tensor, experts in itertools.product(*given):
            expert = experts if num_experts(known_model(model)) else 1
            rest = chips // (data * tensor * expert)
            for accumulate, remat in itertools.product(self.accumulate, self.remat):
                plain = Case(
                    model=model,
                    topology=self.topology,
                    mesh=MeshConfig(data=data, fsdp=rest, expert=expert, tensor=tensor),
                    accumulate=accumulate,
                    remat=remat,
                    batch_size=self.step_tokens // length,
                    length=length,
                )
                for technique in self.technique:
                    yield from self._with(plain, technique)
            for weights in self.decode:
                yield Case(
                    model=model,
                    topology=self.topology,
                    mesh=MeshConfig(data=chips // (tensor * expert), expert=expert, tensor=tensor),
                    accumulate=1,
                    remat="none",
                    batch_size=self.decode_rows,
                    length=length,
                    decode=weights,
                )

    def _with(self, plain: Case, technique: Technique) -> Iterator[Case]:
        """Yield the programs of a technique: one, or one per compiled stage; none if there is only one worker."""
        if technique == "none":
            yield plain
        elif technique in ONEBIT:
            if plain.mesh.data > 1:
                yield dataclasses.replace(plain, technique=technique)
        else:
            schedule = stages_of(plain, technique, self.efficiency, self.steps)
            for length, kept in schedule.chosen(self.points):
                if technique == "random_ltd":
                    yield dataclasses.replace(plain, technique=technique, kept=kept)
                else:
                    yield dataclasses.replace(plain, technique=technique, length=length)


PRESETS = {
    "smoke": Config(
        model=("gpt2",),
        topology="v5e:2x4",
        batch_size=8,
        length=(256,),
        tensor=(1,),
        accumulate=(1,),
        tokens=1e9,
    ),
    "default": Config(),
    # GPT-3 1.3B with each technique of the papers: 64 chips, two replicas of 32 for the 1-bit optimizers.
    "techniques": Config(
        model=("gpt3-1.3b", "gpt3-1.3b-moe-128"),
        topology="v5p:4x4x4",
        batch_size=512,
        data=(2,),
        expert=(32,),
        tensor=(1,),
        accumulate=(1,),
        technique=get_args(Technique),
        decode=get_args(Weights),
        tokens=300e9,
        data_bandwidth=6.25e9,
    ),
    "sweep": Config(
        model=("bloom-7b1",),
        topology="v5p:4x4x4",
        batch_size=1024,
        length=(2048, 8192),
        tensor=(1, 2, 4),
        accumulate=(1, 2),
        remat=("full", "dots"),
    ),
    "paper": Config(),
}
"""Options of the command by the name of their preset."""

FREE = (*OUTPUT, "tokens", "data_bandwidth")
"""Fields that can change when a run is resumed."""
