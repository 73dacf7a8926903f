"""Config and presets of the experiment ``bloom``."""

import dataclasses
import math
import pathlib
from typing import Literal

from effscale.command.folder import OUTPUT
from effscale.experiments.shared.config_parts import TextPart
from effscale.models import TransformerConfig, bloom
from effscale.models.config import Remat
from effscale.options import PositiveInt, check, is_finite
from effscale.parallel import MeshConfig
from effscale.training import ScheduleConfig, Stages, batch_ramp

CODE = "code"
"""The source-code component: Python's standard library."""
VOCABULARY_MULTIPLE = 512
"""The number of embedding rows is a multiple of this: 128 times the four shards of BLOOM's embedding, which has 250,880 rows for 250,680
tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A BLOOM of any size; the vocabulary is the tokenizer's, padded to a multiple of 512."""

    num_layers: int = 4
    """Number of layers."""
    d_model: int = 128
    """Width of the residual stream."""
    num_heads: int = 4
    """Number of attention heads."""
    dropout: float = 0.0
    """Dropout rate of embeddings, attention and residuals."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix products."""
    remat: Remat = "dots"
    """What the backward pass recomputes to save memory: none, dots (everything except matrix products) or full."""
    init_std: float | None = None
    """Standard deviation of the initial weights; None uses sqrt(1 / (3 d_model)), the rule behind BLOOM's 0.0048."""

    def build(self, vocab_size: int) -> TransformerConfig:
        """Return the config of the transformer."""
        config = bloom(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads,
            vocab_size=-(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
            dropout=self.dropout,
        )
        std = math.sqrt(1 / (3 * self.d_model)) if self.init_std is None else self.init_std
        return dataclasses.replace(config, dtype=self.dtype, remat=self.remat, init_std=std)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretraining, counted in samples as for BLOOM; a sample is a row of tokens."""

    samples: int = 16_000
    """Number of training rows."""
    batch_size: int = 16
    """Rows per batch at the end of the batch-size ramp."""
    ramp_start: int = 8
    """Rows per batch at the start of the ramp."""
    ramp_increment: int = 4
    """Rows by which the batch grows at each step of the ramp."""
    ramp_samples: int = 1_000
    """Number of training rows over which the batch grows; 0 disables the ramp."""
    learning_rate: float = 3e-3
    """Peak learning rate: a linear warmup, then a cosine."""
    final_learning_rate: float = 3e-4
    """Learning rate at the end of the cosine and after it."""
    warmup_samples: int = 500
    """Number of rows of warmup."""
    decay_samples: int = 16_000
    """Number of rows after which the cosine ends."""
    accumulate: int = 1
    """Number of micro-batches that a batch is split into, to save memory."""

    def __post_init__(self):
        for name in ("samples", "batch_size", "accumulate"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        check(self, 0 < self.learning_rate < math.inf, "learning_rate", "above 0 and finite")
        final = f"above 0 and at most learning_rate={self.learning_rate}"
        below_peak = 0 < self.final_learning_rate <= self.learning_rate
        check(self, below_peak, "final_learning_rate", final)
        check(self, self.decay_samples >= 1, "decay_samples", "at least 1")
        below = f"from 0 to below decay_samples={self.decay_samples}"
        check(self, 0 <= self.warmup_samples < self.decay_samples, "warmup_samples", below)
        check(self, self.ramp_samples >= 0, "ramp_samples", "at least 0")
        start = f"from 1 to batch_size={self.batch_size}"
        check(self, 1 <= self.ramp_start <= self.batch_size, "ramp_start", start)
        check(self, self.ramp_increment >= 1, "ramp_increment", "at least 1")
        rise = self.batch_size - self.ramp_start
        leads = not self.ramp_samples or rise % self.ramp_increment == 0
        divisor = f"a divisor of batch_size - ramp_start = {rise}"
        check(self, leads, "ramp_increment", divisor)
        for size in self.ramp().values:
            divides = size % self.accumulate == 0
            check(self, divides, "accumulate", f"a divisor of each batch, {size}")

    def ramp(self) -> Stages[int]:
        """Return the batch size at each step."""
        if not self.ramp_samples:
            return Stages((0,), (self.batch_size,))
        return batch_ramp(self.ramp_start, self.ramp_increment, self.ramp_samples, self.batch_size)

    @property
    def steps(self) -> int:
        """Return the number of batches that cover all rows."""
        return self.ramp().steps_until(self.samples, cost=lambda size: size)

    def schedule(self, length: int) -> ScheduleConfig:
        """Return the learning rate by tokens, with ``length`` tokens per row."""
        return ScheduleConfig(
            peak=self.learning_rate,
            final=self.final_learning_rate,
            warmup=self.warmup_samples * length,
            total=self.decay_samples * length,
            unit="tokens",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """Prompted multitask fine-tuning at a constant learning rate, as for BLOOMZ."""

    steps: int = 600
    """Number of optimizer steps."""
    batch_size: int = 16
    """Packed rows per batch."""
    accumulate: int = 1
    """Number of micro-batches that a batch is split into, to save memory."""
    learning_rate: float = 3e-4
    """Learning rate, without warmup or decay."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    cap: int = 2_000
    """Maximum number of examples per task, language and template; xP3 uses 100,000."""
    eval_every: int = 100
    """Steps between evaluations on validation examples, which select the checkpoint."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "cap", "eval_every"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        divisor = f"a divisor of batch_size={self.batch_size}"
        check(self, self.batch_size % self.accumulate == 0, "accumulate", divisor)
        check(self, 0 < self.learning_rate < math.inf, "learning_rate", "above 0 and finite")
        check(
            self,
            is_finite(self.weight_decay) and self.weight_decay >= 0,
            "weight_decay",
            "at least 0",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleaningConfig:
    """Which documents are left out."""

    min_characters: int = 100
    """Minimum length of a document, in characters; shorter ones are left out."""
    max_character_repetition: float = 0.3
    """Maximum share of a document's most frequent runs of ten characters; does not apply to code."""
    near_duplicates: float | None = 0.8
    """Similarity from which the later of two near-duplicate documents is left out; None keeps both."""
    identify_language: bool = False
    """Leave out documents that are identified as being in another language."""

    def __post_init__(self):
        check(self, self.min_characters >= 1, "min_characters", "at least 1")
        share = self.max_character_repetition
        check(self, 0 <= share <= 1, "max_character_repetition", "from 0 to 1")
        near = self.near_duplicates
        check(self, near is None or 0 < near < 1, "near_duplicates", "between 0 and 1, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TextPart):
    """Options of a run; every field is a command-line option."""

    data: pathlib.Path | None = None
    """A folder that contains, for each language, a folder of *.txt or *.jsonl files (field text).
    The default corpus is human-translated messages of a home automation's interface, which `make assets` installs."""
    separator: str | None = None
    """Separator of documents in a *.txt file of --data, such as <|endoftext|>; without one, each file is a document."""
    license: str = "unknown"
    """License of the text in --data, for the datasheet."""
    languages: tuple[str, ...] = (
        "en",
        "es",
        "fr",
        "de",
        "id",
        "ru",
        "it",
        "pt-BR",
        "ca",
        "zh-Hans",
    )
    """Languages of the corpus, by the names of their folders."""
    new_languages: tuple[str, ...] = ("it", "pt-BR", "ca", "zh-Hans")
    """Languages in which no task is learned, so that fine-tuning has to transfer to them."""
    code: float = 0.13
    """Share of Python's standard library in the training rows, the share of code in ROOTS; languages share the rest in proportion to their sizes. 0 means no code."""
    tasks: pathlib.Path | None = None
    """A folder with a YAML file for each task, TASK.yaml, and its examples in TASK/LANGUAGE/{train,validation,test}.jsonl.
    The default tasks belong to the default corpus."""
    new_tasks: tuple[str, ...] = ("continuation", "cloze")
    """Tasks that are not learned in any language."""
    tokenizer: pathlib.Path | None = None
    """A tokenizer.json or its folder, to use instead of training a tokenizer on the corpus."""
    vocab_size: int = 4096
    tokenizer_characters: PositiveInt = 4 << 20
    """Maximum number of characters of each language, sampled from its training text, that the tokenizer is trained on."""
    length: int = 128
    """Sequence length: tokens per row."""
    cleaning: CleaningConfig = CleaningConfig()
    """Which documents are left out."""
    model: ModelConfig = ModelConfig()
    """The model."""
    pretrain: PretrainConfig = PretrainConfig()
    """Pretraining."""
    finetune: FineTuneConfig = FineTuneConfig()
    """Prompted multitask fine-tuning."""
    b2: float = 0.95
    """Decay rate of AdamW's second moment."""
    weight_decay: float = 0.1
    """Weight decay of AdamW during pretraining."""
    clip_norm: float = 1.0
    """Maximum norm of the gradient; larger gradients are clipped."""
    eval_examples: int = 48
    """Test examples per task, language and template."""
    selection_examples: int = 16
    """Validation examples per task and language, which select the fine-tuning checkpoint."""
    eval_batch: int = 32
    """Rows per evaluation batch."""
    eval_batches: int = 20
    """Number of held-out batches per component for the mean loss."""
    seeds: int = 3
    """Number of runs.
    Seeds 0, 1, ... decide the initial weights, the order of data, and which examples are used if there are more than the cap."""
    mesh: MeshConfig = MeshConfig()
    """Device mesh: the size of each axis; -1 means all remaining devices."""
    checkpoint_every: int = 200
    """Steps between checkpoints during pretraining, and between evaluations on held-out text."""

    def __post_init__(self):
        super().__post_init__()
        counts = ("length", "eval_examples", "selection_examples", "eval_batch", "eval_batches")
        for name in (*counts, "seeds", "checkpoint_every"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        together = (self.data is None) == (self.tasks is None)
        check(self, together, "tasks", "set if and only if data is set")
        check(self, self.separator != "", "separator", "a text, or None")
        different = len(set(self.languages)) == len(self.languages) >= 1
        check(
            self,
            different and CODE not in self.languages,
            "languages",
            "different languages, at least one",
        )
        known = set(self.new_languages) < set(self.languages)
        check(self, known, "new_languages", f"some of languages={self.languages}, but not all")
        check(self, len(set(self.new_tasks)) == len(self.new_tasks), "new_tasks", "different tasks")
        check(self, 0 <= self.code < 1, "code", "at least 0 and below 1")
        check(self, 0 <= self.b2 < 1, "b2", "at least 0 and below 1")
        check(self, self.weight_decay >= 0, "weight_decay", "at least 0")
        check(self, self.clip_norm > 0, "clip_norm", "above 0")
        self.model.build(self.vocab_size)  # raises for an invalid model


def _bloom(
    layers: int,
    width: int,
    heads: int,
    batch: int,
    increment: int,
    peak: float,
    *,
    final: float = 1e-5,
    tuned: int = 2048,
) -> Config:
    """Return BLOOM's published settings for one of its sizes; the paths are placeholders for your corpus, tasks and tokenizer."""
    return Config(
        data=pathlib.Path("FOLDER"),
        tasks=pathlib.Path("TASKS"),
        tokenizer=pathlib.Path("TOKENIZER"),
        vocab_size=250_680,
        length=2048,
        model=ModelConfig(
            num_layers=layers,
            d_model=width,
            num_heads=heads,
            init_std=0.0048,
            dtype="bfloat16",
            remat="full",
        ),
        pretrain=PretrainConfig(
            samples=220_000_000,
            batch_size=batch,
            ramp_start=192,
            ramp_increment=increment,
            ramp_samples=9_765_625,
            learning_rate=peak,
            final_learning_rate=final,
            warmup_samples=183_105,
            decay_samples=200_000_000,
        ),
        finetune=FineTuneConfig(
            steps=6_348_800 // tuned,
            batch_size=tuned,
            learning_rate=2e-5,
            cap=100_000,
            eval_every=250,
        ),
        mesh=MeshConfig(fsdp=-1, data=1),
        seeds=1,
        checkpoint_every=100,
    )


PRESETS = {
    "smoke": Config(
        languages=("en", "es", "ca"),
        new_languages=("ca",),
        code=0.0,
        vocab_size=512,
        length=64,
        model=ModelConfig(num_layers=1, d_model=32, num_heads=2),
        pretrain=PretrainConfig(
            samples=64, batch_size=16, ramp_samples=16, warmup_samples=8, decay_samples=64
        ),
        finetune=FineTuneConfig(steps=4, cap=40, eval_every=2),
        eval_examples=2,
        seeds=1,
        checkpoint_every=2,
    ),
    "default": Config(),
    # Le Scao et al., 2022, table 3. The batch grows by 16 rows for 1B1, 1B7 and 176B, and by 32 for the others.
    "bloom-560m": _bloom(24, 1024, 16, 256, 32, 3.0e-4, tuned=1024),
    "bloom-1b1": _bloom(24, 1536, 16, 256, 16, 2.5e-4, tuned=1024),
    "bloom-1b7": _bloom(24, 2048, 16, 512, 16, 2.0e-4),
    "bloom-3b": _bloom(30, 2560, 32, 512, 32, 1.6e-4),
    "bloom-7b1": _bloom(30, 4096, 32, 512, 32, 1.2e-4),
    "bloom-176b": _bloom(70, 14336, 112, 2048, 16, 6e-5, final=6e-6),
}
PRESETS["paper"] = PRESETS["bloom-176b"]

MAY_DIFFER_ON_RESUME = (*OUTPUT, "cache", "seeds", "mesh", "checkpoint_every", "eval_batch")
"""Fields that can change when a run is resumed."""
