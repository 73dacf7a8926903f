"""The data of the experiment ``finetune``: drug reviews, scikit-learn's digits, Fashion-MNIST."""

import dataclasses
import gzip
import math
import pathlib
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import UInt8

from effscale.experiments.shared.assets import MissingAssetError, drug_reviews, package_folder
from effscale.experiments.shared.classifier.batches import Examples, Images, Texts


@dataclasses.dataclass(frozen=True)
class Data:
    """A task's examples.

    Attributes:
        train: Training examples.
        test: Test examples.
        num_classes: Number of labels.
    """

    train: Examples
    test: Examples
    num_classes: int

    @property
    def majority(self) -> float:
        """The share of the most frequent label of the test examples, which is the accuracy of a constant answer."""
        return float(np.bincount(self.test.labels).max() / len(self.test))


def reviews_data(
    tokenizer: tokenizers.Tokenizer, max_length: int, train: int | None, test: int | None
) -> Data:
    """Return the drug reviews, truncated to ``max_length`` tokens; the first ``train`` and ``test`` of them, or all."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)

    def read(split: Any, wanted: int | None) -> Texts:
        found = drug_reviews(split)
        count = _count(f"reviews.{split}", wanted, len(found))
        ids = tuple(tuple(tokenizer.encode(text).ids) for text in found.texts[:count])
        return Texts(ids, np.array(found.labels[:count]), max_length)

    return Data(read("train", train), read("test", test), 3)


def digits_data(image_size: int, train: int | None, test: int | None) -> Data:
    """Return the 1,797 handwritten digits of 8 x 8 pixels in scikit-learn, always split in the same order.

    References:
        Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (1998), UCI Machine Learning Repository.
            https://doi.org/10.24432/C50P49
    """
    try:
        folder = package_folder("sklearn")
    except MissingAssetError as error:
        raise MissingAssetError(
            "the digits need scikit-learn: install it with pip install scikit-learn"
        ) from error
    # Read as a file, because importing scikit-learn takes seconds.
    table = np.loadtxt(
        folder / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.uint8
    )
    table = table[np.random.default_rng(0).permutation(len(table))]
    held = _count("digits.test", test, len(table) - 1)
    count = _count("digits.train", train, len(table) - held)
    made = lambda rows: Images(rows[:, :-1].reshape(-1, 8, 8), rows[:, -1], 16.0, image_size)
    return Data(made(table[held : held + count]), made(table[:held]), 10)


def fashion_data(
    folder: pathlib.Path, image_size: int, train: int | None, test: int | None
) -> Data:
    """Return the first ``train`` and ``test`` of Fashion-MNIST's 60,000 and 10,000 images of 28 x 28 pixels, or all.

    Raises:
        FileNotFoundError: The folder does not contain the files; the message says where to get them.

    References:
        Xiao et al., "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms" (2017).
            https://arxiv.org/abs/1708.07747
    """

    def read(name: str, split: str, wanted: int | None) -> Images:
        pixels = read_idx(_idx_file(folder, f"{split}-images-idx3-ubyte"))
        labels = read_idx(_idx_file(folder, f"{split}-labels-idx1-ubyte"))
        if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
            raise ValueError(
                f"{folder}: images and labels of {split} do not match, got shapes {pixels.shape} and {labels.shape}"
            )
        count = _count(f"fashion.{name}", wanted, len(pixels))
        return Images(pixels[:count], labels[:count], 255.0, image_size)

    return Data(read("train", "train", train), read("test", "t10k", test), 10)


def read_idx(path: pathlib.Path) -> UInt8[np.ndarray, "..."]:
    """Read an array of bytes in the IDX format of MNIST: two zeros, the type, the number of dimensions, their sizes.

    Args:
        path: The file, gzipped or not.

    Raises:
        ValueError: The file does not have this format, or is incomplete.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: is damaged: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: is not an IDX file of bytes: it begins with {content[:4]!r}")
    start = 4 + 4 * content[3]
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4"))
    if len(shape) != content[3] or len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path}: is damaged: its header specifies {shape} bytes, but {max(len(content) - start, 0):,} follow"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _idx_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{folder}: does not contain {name}.gz of Fashion-MNIST. On Debian, use apt-get install dataset-fashion-mnist; "
        "or, without root, apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion, "
        "then --fashion-mnist fashion/usr/share/datasets/fashion-mnist. The four files of "
        "https://github.com/zalandoresearch/fashion-mnist work as well. Or choose another task, such as digits"
    )


def _count(field: str, wanted: int | None, available: int) -> int:
    if wanted is not None and wanted > available:
        raise ValueError(
            f"{field} must be at most {available}, the number of examples, got {wanted}"
        )
    return available if wanted is None else wanted
