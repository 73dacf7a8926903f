"""Config and presets of the experiment ``random_ltd_vit``."""

import dataclasses
import pathlib
from typing import Literal

from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.config_parts import ImagePart
from effscale.experiments.shared.random_ltd.arms import Dropping
from effscale.models.validation import check
from effscale.study.folder import OUTPUT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ImagePart):
    """Options of a run; every field is a command-line option."""

    task: Literal["fashion", "digits"] = "fashion"
    """The task: Fashion-MNIST, or scikit-learn's digits."""
    seeds: int = 3
    """Number of runs per arm. Seeds 0, 1, ... decide the head's initial weights, the order of images and which tokens are kept."""
    fashion: Recipe = Recipe(epochs=1, learning_rate=3e-5, train=1600, test=1000)
    """Fashion-MNIST; 60,000 training and 10,000 test images exist."""
    digits: Recipe = Recipe(epochs=1, learning_rate=3e-5, test=500)
    """Digits; 1,797 images exist, including the test images."""
    image_size: int = 98
    """Height and width to which images are resized, a multiple of the ViT's patch size of 14; 98 gives 50 tokens."""
    ltd: Dropping = Dropping(min_value=8, seq_per_step=8, share=0.8)
    """Schedule of random-LTD."""
    warmup: float = 0.1
    """Fraction of the steps used for warmup; then the learning rate decays linearly by layer tokens to 0."""
    eval_every: int = 25
    """Steps between evaluations on part of the test images, and between checkpoints; the last evaluation is on all of them."""
    eval_batches: int = 12
    """Number of batches in that part."""
    out: pathlib.Path | None = None
    """Run folder; the default is runs/random_ltd_vit/<time>."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("eval_every", "eval_batches"):
            check(self, getattr(self, name) >= 1, name, "at least 1")

    @property
    def recipe(self) -> Recipe:
        """The recipe of the task."""
        return getattr(self, self.task)


PRESETS = {
    "smoke": Config(
        task="digits",
        seeds=1,
        digits=Recipe(epochs=1, batch_size=8, learning_rate=3e-5, train=64, test=32),
        image_size=42,
        ltd=Dropping(min_value=4, seq_per_step=4, share=0.75),
        eval_every=4,
        eval_batches=2,
    ),
    "default": Config(),
    # Li et al., 2022: a ViT with 197 tokens, batches of 128, 32 to 197 tokens over 3910 steps, which are 10 of 13 epochs of
    # CIFAR. Theirs is SGD with 1e-4; the rate here is AdamW's.
    "paper": Config(
        fashion=Recipe(epochs=13, batch_size=128, learning_rate=5e-5),
        digits=Recipe(epochs=500, batch_size=128, learning_rate=5e-5, test=500),
        image_size=224,
        ltd=Dropping(min_value=32, seq_per_step=8, share=10 / 13),
        eval_every=468,
        eval_batches=10,
    ),
}

FREE = ("seeds", "fashion_mnist", *OUTPUT)
