"""Parts of the experiments' configs: fields that several of them have, and what these must be.

A config inherits from its parts, so that its options and its ``config.json`` are flat. It may give a field another default, which
keeps the docstring, or a docstring of its own. Every ``__post_init__`` begins with that of ``super()``.
"""

import dataclasses
import pathlib

from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.models.validation import check, check_finite
from effscale.training import AdamWConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputPart:
    """Where a run goes; every config has it, and so all of its numbers are finite."""

    out: pathlib.Path | None = None
    """Folder of the run; by default runs/<experiment>/<time>."""
    resume: bool = False
    """Go on with the run in --out: finished runs are kept, the last one goes on from its checkpoint."""

    def __post_init__(self):
        check_finite(self)
        resumable = not (self.resume and self.out is None)
        check(self, resumable, "resume", "given with --out, the folder to go on with")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPart(OutputPart):
    """What is made of a corpus."""

    vocab_size: int = 1024
    """Size of the byte-level BPE that is trained on the corpus."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out."""
    cache: pathlib.Path | None = None
    """Where prepared corpora are kept; by default the user's cache folder."""

    def __post_init__(self):
        super().__post_init__()
        check(self, 0 < self.validation_fraction < 1, "validation_fraction", "between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorporaPart(TextPart):
    """A corpus, or a mixture of several."""

    corpus: tuple[str, ...] = ("stdlib",)
    """Sources, each [WEIGHT*]KIND: stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field, hf:NAME_OR_FOLDER#field."""

    def __post_init__(self):
        super().__post_init__()
        check(self, len(self.corpus) >= 1, "corpus", "at least one source")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierPart(OutputPart):
    """How classifiers are trained; their recipes are fields of their own."""

    seeds: int = 3
    """Runs of each kind; seeds 0, 1, ... decide what is random."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    optimizer: AdamWConfig = AdamWConfig(b2=0.999, weight_decay=0.01)
    """AdamW."""
    clip_norm: float = 1.0
    """Greatest norm of the gradient."""

    def __post_init__(self):
        super().__post_init__()
        check(self, self.seeds >= 1, "seeds", "at least 1")
        check(self, 0 <= self.warmup < 1, "warmup", "from 0 to below 1")
        check(self, self.clip_norm > 0, "clip_norm", "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePart(ClassifierPart):
    """Fine-tuning of a ViT on images."""

    image_size: int = 56
    """Height and width to which images are resized, a multiple of the ViT's patch."""
    image_model: pathlib.Path | None = None
    """Folder of a ViT to use instead; its images should be normalized by ImageNet's mean and deviation."""
    fashion_mnist: pathlib.Path = pathlib.Path("/usr/share/datasets/fashion-mnist")
    """Folder of Fashion-MNIST's four files."""

    def __post_init__(self):
        super().__post_init__()
        check(self, self.image_size >= 1, "image_size", "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassagePart(CorporaPart, ClassifierPart):
    """Pretraining on text, then fine-tuning on a task: which document is a passage from?"""

    eval_every: int = 100
    """Steps between evaluations on a part of the held-out text, and between checkpoints; at the end all is taken, too."""
    eval_batches: int = 20
    """Batches in that part."""
    classes: int = 20
    """Documents of the task, the largest ones: which of them is a passage from?"""
    passage: int = 32
    """Tokens of a passage."""
    finetune: Recipe = Recipe(epochs=4, batch_size=32, learning_rate=5e-4, train=1000, test=1000)
    """How the task is learned; ``train`` and ``test`` passages of all classes together."""
    optimizer: AdamWConfig = AdamWConfig(b2=0.98, weight_decay=0.01)

    def __post_init__(self):
        super().__post_init__()
        for name in ("eval_every", "eval_batches", "passage"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        check(self, self.classes >= 2, "classes", "at least 2")
        for name in ("train", "test"):
            count = getattr(self.finetune, name)
            each = f"a number of passages, at least classes={self.classes}"
            check(self.finetune, count is not None and count >= self.classes, name, each)
