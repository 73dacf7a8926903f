"""What the experiment ``finetune`` can be told, and its presets."""

import dataclasses
import pathlib
from typing import Literal

from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.config_parts import ImagePart
from effscale.models.validation import check

Task = Literal["reviews", "digits", "fashion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ImagePart):
    """What the run does; every field is an option of the command line."""

    tasks: tuple[Task, ...] = ("reviews", "digits", "fashion")
    """What is learned, one after another."""
    seeds: int = 3
    """Runs of each task; seeds 0, 1, ... decide the head's initial weights, the order of batches and dropout."""
    torch: bool = False
    """Run the twin in PyTorch as well, and compare."""
    reviews: Recipe = Recipe()
    """Drug reviews with MiniLM; there are 600 and 379."""
    digits: Recipe = Recipe(learning_rate=3e-5, test=500)
    """Digits with the ViT; there are 1,797 in all, the test examples included."""
    fashion: Recipe = Recipe(epochs=2, learning_rate=3e-5, train=2000, test=1000)
    """Fashion-MNIST with the ViT; there are 60,000 and 10,000."""
    max_length: int = 128
    """Tokens of a review, the rest is cut off."""
    dropout: bool = False
    """Use the dropouts of the model's config; the twin's are drawn by another generator, and curves differ more."""
    text_model: pathlib.Path | None = None
    """Folder of a BERT to use instead of MiniLM."""
    out: pathlib.Path | None = None
    """Folder of the run; by default runs/finetune/<time>."""

    def __post_init__(self):
        super().__post_init__()
        check(self, len(self.tasks) >= 1, "tasks", "at least one task")
        check(self, len(set(self.tasks)) == len(self.tasks), "tasks", "different tasks")
        check(self, self.max_length >= 4, "max_length", "at least 4")

    def recipe(self, task: Task) -> Recipe:
        """The recipe of a task."""
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

FREE = ("tasks", "seeds", "torch", "fashion_mnist", "out", "resume")
