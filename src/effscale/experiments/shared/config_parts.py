"""Parts of the experiments' configs: shared fields and their checks.

A config inherits from its parts, so its options and its ``config.json`` are flat. It can change the default of a
field, which keeps the docstring, or give it a new docstring. Every ``__post_init__`` begins with that of ``super()``.
"""

import dataclasses
import pathlib

from effscale.command.folder import OutputPart
from effscale.options import check
from effscale.training import AdamWConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPart(OutputPart):
    """Preparation of a corpus."""

    vocab_size: int = 1024
    """Vocabulary size of the byte-level BPE that is trained on the corpus."""
    validation_fraction: float = 0.05
    """Fraction of the documents that is held out."""
    cache: pathlib.Path | None = None
    """Folder for prepared corpora; the default is the user's cache folder."""

    def __post_init__(self):
        super().__post_init__()
        check(self, 0 < self.validation_fraction < 1, "validation_fraction", "between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorporaPart(TextPart):
    """A corpus, or a mixture of several."""

    corpus: tuple[str, ...] = ("stdlib",)
    """Sources of the corpus, each [WEIGHT*]KIND, where KIND is stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field or hf:NAME_OR_FOLDER#field."""

    def __post_init__(self):
        super().__post_init__()
        check(self, len(self.corpus) >= 1, "corpus", "at least one source")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierPart(OutputPart):
    """Training of classifiers; their recipes are separate fields."""

    seeds: int = 3
    """Number of runs of each kind. Seeds 0, 1, ... decide everything random."""
    warmup: float = 0.1
    """Fraction of the steps used for warmup."""
    optimizer: AdamWConfig = AdamWConfig(b2=0.999, weight_decay=0.01)
    """AdamW options."""
    clip_norm: float = 1.0
    """Maximum norm of the gradient; larger gradients are clipped."""

    def __post_init__(self):
        super().__post_init__()
        check(self, self.seeds >= 1, "seeds", "at least 1")
        check(self, 0 <= self.warmup < 1, "warmup", "from 0 to below 1")
        check(self, self.clip_norm > 0, "clip_norm", "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePart(OutputPart):
    """Images and the ViT that is fine-tuned on them."""

    image_size: int = 56
    """Height and width to which images are resized, a multiple of the ViT's patch size."""
    image_model: pathlib.Path | None = None
    """Folder of a ViT to use instead of the default one; it should expect images normalized with ImageNet's mean and standard deviation."""
    fashion_mnist: pathlib.Path = pathlib.Path("/usr/share/datasets/fashion-mnist")
    """Folder with the four files of Fashion-MNIST."""

    def __post_init__(self):
        super().__post_init__()
        check(self, self.image_size >= 1, "image_size", "at least 1")
