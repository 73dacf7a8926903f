"""Quality bounds on documents, from measures that need no trained model."""

import collections
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from effscale.data.cleaning.language import check_language, identify_language
from effscale.data.documents import Reason
from effscale.options import Fraction, Options, PositiveInt


def character_repetition(text: str, length: int = 10) -> float:
    r"""Return the share of a text's character n-grams that are copies of its most frequent ones.

    Of $d$ distinct n-grams, $r$ of which occur more than once, the $\min(\lfloor\sqrt d\rfloor, r)$ most frequent are counted.

    Args:
        text: The text.
        length: The number of characters in an n-gram.

    Returns:
        From 0 to 1; 0 for a text shorter than an n-gram.

    References:
        Laurençon et al., "The BigScience ROOTS Corpus" (2022), appendix on the OSCAR filters. https://arxiv.org/abs/2303.03915

    >>> character_repetition("na" * 30), character_repetition("The quick brown fox jumps over the lazy dog.")
    (0.5098039215686274, 0.0)
    """
    counts = _counts(text, length)
    frequent = sorted((n for n in counts.values() if n > 1), reverse=True)
    most = min(math.isqrt(len(counts)), len(frequent))
    return sum(frequent[:most]) / max(counts.total(), 1)


def word_repetition(text: str, length: int = 5) -> float:
    """Return the share of a text's word n-grams that occur more than once.

    Words are separated by white space and compared in lower case.

    Args:
        text: The text.
        length: The number of words in an n-gram.

    Returns:
        From 0 to 1; 0 for a text shorter than an n-gram.

    References:
        Laurençon et al., "The BigScience ROOTS Corpus" (2022), appendix on the OSCAR filters. https://arxiv.org/abs/2303.03915

    >>> word_repetition("to be or not to be", length=2)
    0.4
    """
    counts = _counts(text.lower().split(), length)
    return sum(n for n in counts.values() if n > 1) / max(counts.total(), 1)


def _counts(items: Sequence[Hashable], length: int) -> collections.Counter[Hashable]:
    if isinstance(items, str):
        return collections.Counter(items[i : i + length] for i in range(len(items) - length + 1))
    return collections.Counter(tuple(items[i : i + length]) for i in range(len(items) - length + 1))


@dataclass(frozen=True, kw_only=True)
class Quality(Options):
    """Bounds that a document must meet. By default only repetition is bounded, with values that suit prose in most languages.

    ROOTS sets its bounds by language: for English at most 0.106 for characters, for Portuguese 0.25, for Chinese 0.2 with
    n-grams of 3.

    Attributes:
        min_characters: The minimum number of characters.
        max_character_repetition: The maximum ``character_repetition``; None sets no bound.
        character_ngram: The number of characters in its n-grams.
        max_word_repetition: The maximum ``word_repetition``; None sets no bound.
        word_ngram: The number of words in its n-grams.
        language: The required language, as ``identify_language`` names it; None allows any.
        min_language_confidence: The minimum confidence with which that language must be identified.

    Raises:
        ValueError: A bound is out of range, or the language is unknown.

    Example:
        >>> Quality(min_characters=20).fault("Too short.")
        ('short', '10 characters, fewer than min_characters=20')
    """

    min_characters: PositiveInt = 1
    max_character_repetition: Fraction | None = 0.2
    character_ngram: PositiveInt = 10
    max_word_repetition: Fraction | None = 0.3
    word_ngram: PositiveInt = 5
    language: str | None = None
    min_language_confidence: Fraction = 0.5

    def __post_init__(self):
        super().__post_init__()
        if self.language is not None:
            check_language(self.language)

    def fault(self, text: str) -> tuple[Reason, str] | None:
        """Return why to leave out a document (the kind of fault and the details), or None to keep it."""
        if len(text) < self.min_characters:
            return (
                "short",
                f"{len(text)} characters, fewer than min_characters={self.min_characters}",
            )
        measures = [
            ("max_character_repetition", character_repetition, self.character_ngram),
            ("max_word_repetition", word_repetition, self.word_ngram),
        ]
        for name, measure, ngram in measures:
            bound = getattr(self, name)
            if bound is not None and (found := measure(text, ngram)) > bound:
                return "repetitive", f"{measure.__name__} is {found:.3f}, above {name}={bound}"
        if self.language is not None:
            language, confidence = identify_language(text)
            if language != self.language or confidence < self.min_language_confidence:
                return (
                    "language",
                    f"found {language!r} with confidence {confidence:.2f}, not language={self.language!r}",
                )
        return None
