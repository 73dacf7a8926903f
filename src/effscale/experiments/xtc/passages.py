"""The task of the experiment ``xtc``: classify which document a passage comes from."""

import dataclasses
from typing import Any

import numpy as np
import tokenizers

from effscale.data import parse_mixture
from effscale.experiments.shared.classifier.batches import Texts, digest
from effscale.experiments.shared.classifier.cutting import cut_passages
from effscale.experiments.xtc.config import Config
from effscale.options import check


@dataclasses.dataclass(frozen=True)
class Passages:
    """Passages for training, for model selection, and for testing.

    Attributes:
        train: From the first three quarters of each document.
        dev: Every other passage of the last quarter.
        test: The passages between those.
        num_classes: Number of documents.
    """

    train: Texts
    dev: Texts
    test: Texts
    num_classes: int

    @property
    def majority(self) -> float:
        """The share of the most frequent label of the test passages, which is the accuracy of a constant answer."""
        return float(np.bincount(self.test.labels).max() / len(self.test))

    def digests(self) -> dict[str, Any]:
        """Return digests of the passages, for ``RunFolder.create``."""
        splits = {"train": self.train, "dev": self.dev, "test": self.test}
        return {
            name: {"passages": len(texts), "digest": digest(texts.arrays())}
            for name, texts in splits.items()
        }


def read_passages(config: Config, tokenizer: tokenizers.Tokenizer) -> Passages:
    """Cut the longest documents of the corpus into passages.

    Args:
        config: Config of the experiment.
        tokenizer: The model's tokenizer; no special tokens are added.

    Raises:
        ValueError: There are too few documents, or they are too short.
    """
    sources, _ = parse_mixture(config.corpus)
    texts = [document.text for source in sources for document in source.documents()]
    enough = f"at most the {len(texts)} documents of the corpus"
    check(config, config.classes <= len(texts), "classes", enough)
    # By characters, so that only these documents need to be encoded; of equally long ones the first.
    longest = sorted(texts, key=lambda text: -len(text))[: config.classes]
    tokenizer.no_padding()
    tokenizer.no_truncation()
    documents = [tokenizer.encode(text, add_special_tokens=False).ids for text in longest]
    asked = {name: getattr(config, name) for name in ("train", "dev", "test")}
    made = cut_passages(documents, config.passage, asked, field="Config")
    return Passages(made["train"], made["dev"], made["test"], config.classes)
