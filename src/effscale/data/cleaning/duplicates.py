"""Documents that are there already: letter by letter, or nearly."""

import hashlib
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt32

from effscale.models.validation import check

SLICE = 4096
"""N-grams that are hashed together."""


def digest(text: str) -> bytes:
    """What equal texts have in common, in 16 bytes. Upper case and the amount of white space do not matter."""
    return hashlib.blake2b(_plain(text).encode(), digest_size=16).digest()


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """When two documents are nearly the same: by the share of character n-grams that they have in common, which MinHash estimates.

    Attributes:
        threshold: The Jaccard similarity of their sets of n-grams from which on the later one is left out. For small edits of a
            paragraph it is about 0.9.
        ngram: Characters of an n-gram.
        permutations: Numbers in a document's signature. The estimate's standard deviation is about
            ``sqrt(threshold * (1 - threshold) / permutations)``, 0.035 by default.

    Raises:
        ValueError: A field is out of range.

    References:
        Broder, "On the resemblance and containment of documents", 1997. Lee et al., "Deduplicating training data makes language
        models better", 2022.

    Example:
        >>> index = NearDuplicates(threshold=0.5).index()
        >>> near = NearDuplicates(threshold=0.5)
        >>> texts = ["The cat sat on the mat and looked at me.", "The cat sat on the mat and looked at you.", "It rained."]
        >>> [index.add(near.signature(text)) for text in texts]
        [False, True, False]
    """

    threshold: float = 0.8
    ngram: int = 8
    permutations: int = 128

    def __post_init__(self):
        check(self, 0 < self.threshold < 1, "threshold", "between 0 and 1")
        check(self, self.ngram >= 1, "ngram", "at least 1")
        check(self, self.permutations >= 16, "permutations", "at least 16")

    def signature(self, text: str) -> UInt32[np.ndarray, "permutations"]:
        """The MinHash signature of a text.

        Raises:
            ModuleNotFoundError: The extra ``cleaning`` is not installed.
        """
        plain, found = _plain(text), self.minhash()
        count = max(len(plain) - self.ngram + 1, 1)
        for first in range(0, count, SLICE):  # all at once take a kilobyte each
            starts = range(first, min(first + SLICE, count))
            found.update_batch({plain[i : i + self.ngram].encode() for i in starts})
        return found.hashvalues.astype(np.uint32)

    def minhash(self, signature: UInt32[np.ndarray, "permutations"] | None = None) -> Any:
        """Datasketch's object of a signature, or of a text without n-grams."""
        make = _datasketch().MinHash
        options = {"num_perm": self.permutations, "hashfunc": zlib.crc32, "scheme": "affine32"}
        return make(**options, hashvalues=signature)

    @property
    def bands(self) -> tuple[int, int]:
        """How many bands of how many numbers the index compares: as long as they find 99 % of the pairs of just this similarity."""
        for rows in range(self.permutations, 1, -1):
            bands = self.permutations // rows
            if 1 - (1 - self.threshold**rows) ** bands >= 0.99:
                return bands, rows
        return self.permutations, 1

    def index(self) -> "NearDuplicateIndex":
        """An empty index of signatures."""
        return NearDuplicateIndex(self)


class NearDuplicateIndex:
    """The signatures of the documents so far, some kilobytes each.

    Args:
        near: What makes duplicates.
    """

    def __init__(self, near: NearDuplicates):
        self._near = near
        self._index = _datasketch().MinHashLSH(num_perm=near.permutations, params=near.bands)
        self._signatures: list[np.ndarray] = []

    def add(self, signature: UInt32[np.ndarray, "permutations"]) -> bool:
        """Whether a document is nearly the same as one that was added before; if not, it is added."""
        hashed = self._near.minhash(signature)
        # The index finds candidates; their signatures decide.
        for candidate in self._index.query(hashed):
            if (self._signatures[candidate] == signature).mean() >= self._near.threshold:
                return True
        self._index.insert(len(self._signatures), hashed, check_duplication=False)
        self._signatures.append(signature)
        return False


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _datasketch() -> Any:
    try:
        import datasketch
    except ModuleNotFoundError as error:
        error.add_note(
            "Finding near duplicates needs datasketch: install it with pip install datasketch"
        )
        raise
    return datasketch
