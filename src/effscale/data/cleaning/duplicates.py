"""Exact and near duplicates among documents."""

import hashlib
import zlib
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import UInt32

from effscale.extras import require
from effscale.options import Bounds, Options, PositiveInt

SLICE = 4096
"""The number of n-grams hashed together."""


def digest(text: str) -> bytes:
    """Return a 16-byte digest of a text that ignores case and the amount of white space."""
    return hashlib.blake2b(_plain(text).encode(), digest_size=16).digest()


@dataclass(frozen=True, kw_only=True)
class NearDuplicates(Options):
    """Near-duplicate detection by MinHash.

    Two documents are near duplicates if they share a large fraction of their character n-grams, which MinHash estimates.

    Attributes:
        threshold: The Jaccard similarity of the n-gram sets from which on the later document counts as a duplicate. Small edits
            of a paragraph give about 0.9.
        ngram: The number of characters in an n-gram.
        permutations: The length of a signature. The standard deviation of the estimate is about
            ``sqrt(threshold * (1 - threshold) / permutations)``, 0.035 by default. So half of the pairs exactly at the
            threshold are found, nearly all from two deviations above it, and hardly any two deviations below it.

    Raises:
        ValueError: A field is out of range.

    References:
        Broder, "On the Resemblance and Containment of Documents" (1997). https://doi.org/10.1109/SEQUEN.1997.666900
        Lee et al., "Deduplicating Training Data Makes Language Models Better" (2022). https://arxiv.org/abs/2107.06499

    Example:
        >>> index = NearDuplicates(threshold=0.5).index()
        >>> near = NearDuplicates(threshold=0.5)
        >>> texts = ["The cat sat on the mat and looked at me.", "The cat sat on the mat and looked at you.", "It rained."]
        >>> [index.add(near.signature(text)) for text in texts]
        [False, True, False]
    """

    threshold: Annotated[float, Bounds(above=0, below=1)] = 0.8
    ngram: PositiveInt = 8
    permutations: Annotated[int, Bounds(at_least=16)] = 128

    def signature(self, text: str) -> UInt32[np.ndarray, "permutations"]:
        """Return the MinHash signature of a text.

        Raises:
            ModuleNotFoundError: The extra ``cleaning`` is not installed.
        """
        plain, found = _plain(text), self.minhash()
        count = max(len(plain) - self.ngram + 1, 1)
        for first in range(0, count, SLICE):  # each n-gram takes a kilobyte while hashed
            starts = range(first, min(first + SLICE, count))
            found.update_batch({plain[i : i + self.ngram].encode() for i in starts})
        return found.hashvalues.astype(np.uint32)

    def minhash(self, signature: UInt32[np.ndarray, "permutations"] | None = None) -> Any:
        """Return the datasketch object of a signature; without a signature, that of a text without n-grams."""
        make = _datasketch().MinHash
        options = {"num_perm": self.permutations, "hashfunc": zlib.crc32, "scheme": "affine32"}
        return make(**options, hashvalues=signature)

    @property
    def bands(self) -> tuple[int, int]:
        """Return the number of bands and their length, the longest with which the index proposes 99% of the pairs at the threshold, of which the estimate then keeps half."""
        for rows in range(self.permutations, 1, -1):
            bands = self.permutations // rows
            if 1 - (1 - self.threshold**rows) ** bands >= 0.99:
                return bands, rows
        return self.permutations, 1

    def index(self) -> "NearDuplicateIndex":
        """Return an empty index of signatures."""
        return NearDuplicateIndex(self)


class NearDuplicateIndex:
    """An index of the signatures seen so far, a few kilobytes each.

    Args:
        near: The definition of a near duplicate.
    """

    def __init__(self, near: NearDuplicates):
        self._near = near
        self._index = _datasketch().MinHashLSH(num_perm=near.permutations, params=near.bands)
        self._signatures: list[np.ndarray] = []

    def add(self, signature: UInt32[np.ndarray, "permutations"]) -> bool:
        """Return whether a document is a near duplicate of an earlier one; if it is not, add it."""
        hashed = self._near.minhash(signature)
        # The index returns candidates; comparing their signatures decides.
        for candidate in self._index.query(hashed):
            if (self._signatures[candidate] == signature).mean() >= self._near.threshold:
                return True
        self._index.insert(len(self._signatures), hashed, check_duplication=False)
        self._signatures.append(signature)
        return False


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _datasketch() -> Any:
    require("finding near duplicates", "datasketch")
    import datasketch

    return datasketch
