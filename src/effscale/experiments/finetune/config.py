"""Config and presets of the experiment ``finetune``."""

import dataclasses
import pathlib
from typing import Literal

from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.config_parts import ClassifierPart, ImagePart
from effscale.options import check
from effscale.study.folder import OUTPUT

Task = Literal["reviews", "digits", "fashion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ClassifierPart, ImagePart):
    """Options of a run; every field is a command-line option."""

    tasks: tuple[Task, ...] = ("reviews", "digits", "fashion")
    """Tasks to learn, one after another."""
    seeds: int = 3
    """Number of runs per task. Seeds 0, 1, ... decide the head's initial weights, the order of batches and dropout."""
    torch: bool = False
    """Also run the PyTorch baseline, and compare."""
    reviews: Recipe = Recipe()
    """Drug reviews with MiniLM; 600 training and 379 test examples exist."""
    digits: Recipe = Recipe(learning_rate=3e-5, test=500)
    """Digits with the ViT; 1,797 examples exist, including the test examples."""
    fashion: Recipe = Recipe(epochs=2, learning_rate=3e-5, train=2000, test=1000)
    """Fashion-MNIST with the ViT; 60,000 training and 10,000 test examples exist."""
    max_length: int = 128
    """Maximum number of tokens per review; longer reviews are truncated."""
    dropout: bool = False
    """Use the dropout rates of the model's config. PyTorch draws dropout from another generator, so the curves then differ more."""
    text_model: pathlib.Path | None = None
    """Folder of a BERT to use instead of MiniLM."""
    out: pathlib.Path | None = None
    """Run folder; the default is runs/finetune/<time>."""

    def __post_init__(self):
        super().__post_init__()
        check(self, len(self.tasks) >= 1, "tasks", "at least one task")
        check(self, len(set(self.tasks)) == len(self.tasks), "tasks", "different tasks")
        check(self, self.max_length >= 4, "max_length", "at least 4")

    def recipe(self, task: Task) -> Recipe:
        """Return the recipe of a task."""
        return getattr(self, task)


PRESETS = {
    "smoke": Config(
        tasks=("reviews", "digits"),
        seeds=1,
        reviews=Recipe(epochs=1, train=64, test=32),
        digits=Recipe(epochs=1, learning_rate=3e-5, train=64, test=32),
        max_length=32,
        image_size=28,
    ),
    "default": Config(),
    # BERT: Devlin et al., 2018, appendix A.3: 3 epochs, batches of 32, 5e-5, dropout 0.1, up to 512 tokens.
    # ViT: Dosovitskiy et al., 2020, table 4: batches of 512, 500 steps on small sets and 10,000 on such as CIFAR; theirs
    # are of SGD, these of AdamW as all else here.
    "paper": Config(
        reviews=Recipe(epochs=3, batch_size=32, learning_rate=5e-5),
        digits=Recipe(epochs=250, batch_size=512, learning_rate=5e-5, test=500),
        fashion=Recipe(epochs=86, batch_size=512, learning_rate=5e-5),
        max_length=512,
        image_size=224,
        dropout=True,
    ),
}

FREE = ("tasks", "seeds", "torch", "fashion_mnist", *OUTPUT)
