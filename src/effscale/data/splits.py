"""Splits by document: the text decides the split, so that copies stay together."""

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from effscale.options import Bounds, Fraction, Options, checked


def text_hash(text: str, *, seed: int, purpose: bytes) -> float:
    """Return a number in [0, 1) that is uniform over texts and the same on every machine.

    Args:
        text: The text; texts are compared by their exact content.
        seed: Different seeds give independent numbers.
        purpose: Up to 16 bytes; different purposes give independent numbers.
    """
    digest = hashlib.blake2b(
        text.encode(), digest_size=8, salt=int(seed).to_bytes(16, "little"), person=purpose
    )
    return (int.from_bytes(digest.digest(), "little") >> 11) / 2**53


@dataclass(frozen=True, kw_only=True)
class Splits(Options):
    """The splits of a corpus and the fraction of documents that each gets.

    The split of a document is a function of its text and the seed only. It does not depend on its position in the corpus
    or on the other documents. So two documents with the same text are never in different splits.

    Attributes:
        fractions: The names of the splits and their shares, which sum to 1.
        seed: The seed of the assignment.

    >>> Splits(fractions={"train": 0.5, "validation": 0.5}).assign("some text")
    'train'
    """

    fractions: Mapping[str, float] = field(
        default_factory=lambda: {"train": 0.95, "validation": 0.05}
    )
    seed: Annotated[int, Bounds(at_least=0, at_most=2**64 - 1)] = 0

    def __post_init__(self):
        super().__post_init__()
        if not self.fractions:
            raise ValueError("fractions must have at least one split, got {}")
        for name, fraction in self.fractions.items():
            checked(f"fractions[{name!r}]", fraction, Fraction)
        total = sum(self.fractions.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"fractions must sum to 1, got {dict(self.fractions)}, which sum to {total}"
            )

    def assign(self, text: str) -> str:
        """Return the name of the split that a text belongs to."""
        place = text_hash(text, seed=self.seed, purpose=b"split")
        names = [name for name, fraction in self.fractions.items() if fraction > 0]
        bounds = itertools.accumulate(self.fractions[name] for name in names)
        for name, bound in zip(names, bounds, strict=True):
            if place < bound:
                return name
        # Rounding can make the sum of the fractions slightly less than 1.
        return names[-1]
