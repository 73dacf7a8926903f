"""Config and presets of the experiment ``zeroquant``."""

import dataclasses
import pathlib
from typing import Literal, get_args

from effscale.command.folder import OUTPUT
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.config_parts import ClassifierPart
from effscale.options import check
from effscale.quant import LKD

ArmName = Literal[
    "w8a8_per_tensor",
    "w8a8",
    "w8a8_symmetric",
    "w8a16",
    "w4a16",
    "w4a8",
    "w4a8_channel",
    "w4a8_lkd",
    "w4a8_lkd_long",
    "w4a8_lkd_random",
    "w4a8_gptq",
    "w4a8_gptq_normalized",
    "w4",
    "w4_gptq",
    "w4_gptq_normalized",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ClassifierPart):
    """Options of a run; every field is a command-line option."""

    models: tuple[Literal["smollm2", "minilm"], ...] = ("smollm2", "minilm")
    """Models to quantize: a language model, evaluated by perplexity, and a classifier, evaluated by accuracy."""
    arms: tuple[ArmName, ...] = get_args(ArmName)
    """Ways of quantization, each compared with float32. The classifier uses LKD only on its own texts."""
    peers: bool = False
    """Also quantize the language model with torchao and with qwix; both must be installed."""
    rows: int = 16
    """Number of rows of each test text: Wikipedia, and the Python library."""
    length: int = 512
    """Tokens per row of the test texts."""
    batch_rows: int = 4
    """Rows per evaluation batch."""
    calibration_rows: int = 128
    """Number of rows of web pages (C4) for calibrating GPTQ and LKD."""
    calibration_length: int = 256
    """Tokens per calibration row."""
    group_size: int = 64
    """Number of inputs that share a scale in 4-bit weights."""
    lkd: LKD = LKD(steps=64, learning_rate=3e-4, cosine=True)
    """Distillation of the language model's layers, with ``batch_rows`` rows per step."""
    layers: int | None = None
    """Use only this number of first layers of the language model, for a quick test; its perplexity is then meaningless."""
    language_model: pathlib.Path | None = None
    """A folder or GGUF file of a causal model to use instead of SmolLM2-135M."""
    text_model: pathlib.Path | None = None
    """Folder of a BERT to use instead of MiniLM."""
    reviews: Recipe = Recipe()
    """Fine-tuning of the classifier of drug reviews before quantization; 600 training and 379 test examples exist."""
    max_length: int = 128
    """Maximum number of tokens per review; longer reviews are truncated."""
    classifier_lkd: LKD = LKD(steps=75, learning_rate=1e-4)
    """Distillation of the classifier's layers, on its training reviews."""

    def __post_init__(self):
        super().__post_init__()
        check(self, len(self.models) >= 1, "models", "at least one model")
        check(self, len(set(self.models)) == len(self.models), "models", "different models")
        check(self, len(set(self.arms)) == len(self.arms), "arms", "different arms")
        for name in ("rows", "batch_rows", "calibration_rows", "group_size"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        for name in ("rows", "calibration_rows"):
            whole = getattr(self, name) % self.batch_rows == 0
            check(self, whole, name, f"a multiple of batch_rows={self.batch_rows}")
        for name in ("length", "calibration_length"):
            check(self, getattr(self, name) >= 2, name, "at least 2 (a token and the next one)")
        check(self, self.layers is None or self.layers >= 1, "layers", "at least 1")
        check(self, self.max_length >= 4, "max_length", "at least 4")


PRESETS = {
    "smoke": Config(
        arms=("w8a8", "w4a8", "w4a8_lkd", "w4_gptq"),
        rows=2,
        length=32,
        batch_rows=2,
        calibration_rows=2,
        calibration_length=32,
        lkd=LKD(steps=2, learning_rate=1e-4),
        layers=2,
        seeds=1,
        reviews=Recipe(epochs=1, train=64, test=32),
        max_length=32,
        classifier_lkd=LKD(steps=2, learning_rate=1e-4),
    ),
    "default": Config(),
    # Section 5 of the paper: 100 iterations per layer on text of 2,048 tokens for GPT, a learning rate of 5e-6; BERT
    # fine-tuned on up to 128 tokens. GPTQ's paper uses 128 rows of 2,048 tokens for calibration.
    "paper": Config(
        rows=128,
        length=2048,
        batch_rows=1,
        calibration_rows=128,
        calibration_length=2048,
        lkd=LKD(steps=100, learning_rate=5e-6),
        reviews=Recipe(epochs=3, batch_size=32, learning_rate=5e-5),
        classifier_lkd=LKD(steps=100, learning_rate=5e-6),
    ),
}

FREE = ("models", "arms", "peers", *OUTPUT)
"""Fields that can change when a run is resumed."""
