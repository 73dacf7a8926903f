"""Labeled texts and images, and their batches in a fixed order, for the experiment ``finetune``.

Batches are NumPy arrays in a fixed order, so that another library can train on the same ones.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

Batch = dict[str, np.ndarray]

# Mean and standard deviation of ImageNet's pixels, which DINOv2 and similar models use to normalize images.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)

# Number of batches whose texts are sorted by length together, so that a batch has texts of similar length.
SORTED_TOGETHER = 8


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts as token ids, padded in a batch to one of four lengths.

    Attributes:
        ids: Token ids of each text.
        labels: One class per text.
        max_length: Maximum number of tokens per text.
    """

    ids: tuple[tuple[int, ...], ...]
    labels: np.ndarray
    max_length: int

    def __len__(self) -> int:
        return len(self.ids)

    def sizes(self) -> np.ndarray:
        """Number of tokens of each text."""
        return np.array([len(ids) for ids in self.ids])

    def inputs(self, rows: Int[np.ndarray, "batch"]) -> Batch:
        """Return ``input_ids`` and ``attention_mask``, padded on the right to the next quarter of ``max_length``."""
        quarter = math.ceil(self.max_length / 4)
        longest = max(len(self.ids[row]) for row in rows)
        width = min(math.ceil(longest / quarter) * quarter, self.max_length)
        ids = np.zeros((len(rows), width), np.int32)
        mask = np.zeros((len(rows), width), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(self.ids[row])] = self.ids[row]
            mask[i, : len(self.ids[row])] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def arrays(self) -> list[np.ndarray]:
        """Return all arrays of the examples."""
        return [*(np.array(ids) for ids in self.ids), self.labels]


@dataclasses.dataclass(frozen=True)
class Images:
    """Gray images, resized and normalized when a batch is created.

    Attributes:
        pixels: Pixels from 0 to ``white``.
        labels: One class per image.
        white: Maximum pixel value.
        image_size: Height and width that the model needs.
    """

    pixels: UInt8[np.ndarray, "images height width"]
    labels: np.ndarray
    white: float
    image_size: int

    def __len__(self) -> int:
        return len(self.pixels)

    def sizes(self) -> None:
        """None, because all images have the same size."""

    def inputs(self, rows: Int[np.ndarray, "batch"]) -> Batch:
        """Return ``images`` of shape ``(batch, image_size, image_size, 3)``."""
        pixels = self.pixels[rows].astype(np.float32) / np.float32(self.white)
        height, width = (linear_weights(n, self.image_size) for n in pixels.shape[1:])
        grey = (height @ pixels @ width.T)[..., None]
        return {"images": (grey - MEAN) / DEVIATION}

    def arrays(self) -> list[np.ndarray]:
        """Return all arrays of the examples."""
        return [self.pixels, self.labels]


def linear_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Return the weights of linear interpolation from ``old`` to ``new`` samples.

    Samples are at the centers of equal cells, and those at the border are repeated outwards.

    Example:
        >>> linear_weights(2, 4).tolist()
        [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(old)), 0).astype(np.float32)


Examples = Texts | Images


def digest(arrays: Iterable[Any]) -> str:
    """Return a digest of arrays, including their shapes and dtypes.

    Example:
        >>> digest([np.zeros(2)]) == digest([np.zeros(2)]), digest([np.zeros(2)]) == digest([np.zeros((2, 1))])
        (True, False)
    """
    found = hashlib.blake2b(digest_size=16)
    for array in map(np.ascontiguousarray, arrays):
        found.update(f"{array.shape} {array.dtype}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def batch_of(examples: Examples, rows: Int[np.ndarray, "rows"], size: int) -> Batch:
    """Return a batch of ``size`` rows: inputs, ``labels``, and ``weights``, which are 0 in padding rows."""
    filled = np.concatenate([rows, np.repeat(rows[:1], size - len(rows))])
    return examples.inputs(filled) | {
        "labels": examples.labels[filled].astype(np.int32),
        "weights": (np.arange(size) < len(rows)).astype(np.float32),
    }


class TrainingBatches:
    """Endless batches, epoch after epoch; each epoch leaves out examples that do not fill a batch.

    The order depends only on the seed. Texts are shuffled, then sorted by length within groups of a few batches, then
    the batches are shuffled.

    Args:
        examples: The examples.
        batch_size: Examples per batch.
        seed: Seed of the order.

    Example:
        >>> pixels, labels = np.zeros((5, 2, 2), np.uint8), np.arange(5)
        >>> batches = TrainingBatches(Images(pixels, labels, 1.0, 2), batch_size=2, seed=0)
        >>> batches.per_epoch, len(set(np.concatenate([next(batches)["labels"] for _ in range(2)])))
        (2, 4)
    """

    def __init__(self, examples: Examples, *, batch_size: int, seed: int):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.per_epoch = len(examples) // batch_size
        self.step = 0
        self._epoch: tuple[int, list[np.ndarray]] | None = None

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> Batch:
        epoch, place = divmod(self.step, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(np.random.default_rng([self.seed, epoch])))
        self.step += 1
        return batch_of(self.examples, self._epoch[1][place], self.batch_size)

    def get_state(self) -> dict[str, int]:
        """Return the position, for a checkpoint."""
        return {"step": self.step}

    def set_state(self, state: Any) -> None:
        """Continue from a position."""
        self.step = int(state["step"])

    def _order(self, chance: np.random.Generator) -> list[np.ndarray]:
        size, sizes = self.batch_size, self.examples.sizes()
        rows = chance.permutation(len(self.examples))[: self.per_epoch * size]
        if sizes is not None:
            starts = range(0, len(rows), size * SORTED_TOGETHER)
            stretches = [rows[i : i + size * SORTED_TOGETHER] for i in starts]
            rows = np.concatenate([s[np.argsort(sizes[s], kind="stable")] for s in stretches])
        batches = rows.reshape(-1, size)
        return list(batches if sizes is None else batches[chance.permutation(len(batches))])


def evaluation_batches(examples: Examples, batch_size: int) -> Iterator[Batch]:
    """Yield every example once, texts sorted by length; the last batch is padded."""
    sizes = examples.sizes()
    rows = np.arange(len(examples)) if sizes is None else np.argsort(sizes, kind="stable")
    for i in range(0, len(rows), batch_size):
        yield batch_of(examples, rows[i : i + batch_size], batch_size)
