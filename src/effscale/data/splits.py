"""Splits by document: what a text is decides where it goes, so that copies stay together."""

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from effscale.data.seeds import check_seed


def text_hash(text: str, *, seed: int, purpose: bytes) -> float:
    """A number in [0, 1) that is uniform over texts and the same on every machine.

    Args:
        text: The text, compared by its exact content.
        seed: Another seed gives an independent number.
        purpose: Up to 16 bytes; another purpose gives an independent number.
    """
    digest = hashlib.blake2b(
        text.encode(), digest_size=8, salt=int(seed).to_bytes(16, "little"), person=purpose
    )
    return (int.from_bytes(digest.digest(), "little") >> 11) / 2**53


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The parts of a corpus and the fraction of documents that each gets.

    A document's part is a function of its text and the seed alone: not of its place in the corpus,
    nor of the other documents. So two documents with the same text are never in two parts.

    Attributes:
        fractions: The parts' names and their shares, which sum to 1.
        seed: Another seed draws other documents.

    >>> Splits(fractions={"train": 0.5, "validation": 0.5}).assign("some text")
    'train'
    """

    fractions: Mapping[str, float] = field(
        default_factory=lambda: {"train": 0.95, "validation": 0.05}
    )
    seed: int = 0

    def __post_init__(self):
        if not self.fractions:
            raise ValueError("fractions={}: name at least one part.")
        for name, fraction in self.fractions.items():
            if not 0 <= fraction <= 1:
                raise ValueError(f"fractions[{name!r}]={fraction}: it must be from 0 to 1.")
        total = sum(self.fractions.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"fractions={dict(self.fractions)}: they sum to {total}, not 1.")
        check_seed(self.seed)
        if self.seed >= 2**64:
            raise ValueError(f"seed={self.seed}: it must be from 0 to 2**64-1.")

    def assign(self, text: str) -> str:
        """The name of the part that a text belongs to."""
        place = text_hash(text, seed=self.seed, purpose=b"split")
        names = [name for name, fraction in self.fractions.items() if fraction > 0]
        bounds = itertools.accumulate(self.fractions[name] for name in names)
        for name, bound in zip(names, bounds, strict=True):
            if place < bound:
                return name
        # The fractions' sum may be a rounding error short of 1.
        return names[-1]
