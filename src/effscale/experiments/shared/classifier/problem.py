"""A task to fine-tune for: its examples, its pretrained model and its recipe."""

import dataclasses
import pathlib
from typing import Any

import jax

from effscale.experiments.shared import assets
from effscale.experiments.shared.classifier import data as examples
from effscale.experiments.shared.classifier.batches import digest
from effscale.experiments.shared.classifier.data import Data
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.config_parts import ImagePart
from effscale.interop import load_pretrained, load_tokenizer
from effscale.models import TokenInputs, Transformer, resize_images
from effscale.options import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A task with its data and its pretrained model.

    Attributes:
        task: Name of the task.
        recipe: The fine-tuning recipe.
        data: The examples.
        folder: The folder of the pretrained model.
        model: The pretrained model, adapted to the image size; its heads are not used.
    """

    task: str
    recipe: Recipe
    data: Data
    folder: pathlib.Path
    model: Transformer

    def __post_init__(self):
        wanted = f"at most the {len(self.data.train)} training examples"
        fits = self.recipe.batch_size <= len(self.data.train)
        check(self.recipe, fits, "batch_size", wanted)

    @property
    def per_epoch(self) -> int:
        """Number of steps per epoch."""
        return len(self.data.train) // self.recipe.batch_size

    @property
    def steps(self) -> int:
        """Number of steps of a run."""
        return self.per_epoch * self.recipe.epochs

    def digests(self) -> dict[str, Any]:
        """Return digests of the examples and the pretrained model, for ``RunFolder.create``."""
        return {
            "train": {"examples": len(self.data.train), "digest": digest(self.data.train.arrays())},
            "test": {"examples": len(self.data.test), "digest": digest(self.data.test.arrays())},
            "model": {"digest": digest(jax.device_get(jax.tree.leaves(self.model)))},
        }


def prepare_reviews(
    recipe: Recipe, max_length: int, text_model: pathlib.Path | None = None
) -> Problem:
    """Read the drug reviews and their model.

    Args:
        recipe: The fine-tuning recipe.
        max_length: Maximum number of tokens per review; longer reviews are truncated.
        text_model: Folder of a BERT to use instead of MiniLM.

    Raises:
        ValueError: The model is not a BERT, or has fewer positions.
    """
    folder = text_model or assets.minilm_folder()
    data = examples.reviews_data(load_tokenizer(folder), max_length, recipe.train, recipe.test)
    model = read_bert(folder)
    longest = model.config.max_length or max_length
    if max_length > longest:
        raise ValueError(f"max_length must be at most the model's {longest}, got {max_length}")
    return Problem(task="reviews", recipe=recipe, data=data, folder=folder, model=model)


def read_bert(folder: pathlib.Path) -> Transformer:
    """Read the model that classifies texts.

    Args:
        folder: Folder of the model, from ``text_model``.

    Raises:
        ValueError: The model is not a BERT.
    """
    model = load_pretrained(folder)
    if not isinstance(model.config.inputs, TokenInputs) or model.config.causal:
        raise ValueError(f"text_model must be a BERT for this experiment, got {str(folder)!r}")
    return model


def prepare_images(task: str, recipe: Recipe, config: ImagePart) -> Problem:
    """Read a task's images and their model.

    Args:
        task: ``digits`` or ``fashion``.
        recipe: The fine-tuning recipe.
        config: Config of the experiment.
    """
    sizes = (recipe.train, recipe.test)
    if task == "digits":
        data = examples.digits_data(config.image_size, *sizes)
    else:
        data = examples.fashion_data(config.fashion_mnist, config.image_size, *sizes)
    folder = config.image_model or assets.focus_vit_folder()
    model = resize_images(load_pretrained(folder), config.image_size)
    return Problem(task=task, recipe=recipe, data=data, folder=folder, model=model)
