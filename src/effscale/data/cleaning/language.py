"""Language identification with py3langid, whose package includes a model of 97 languages."""

import functools
from typing import Any

from effscale.extras import require
from effscale.options import did_you_mean


def identify_language(text: str) -> tuple[str, float]:
    """Identify the language of a text.

    Short texts are often mistaken for a related language.

    Args:
        text: The text.

    Returns:
        The ISO 639-1 code (``en``, ``zh``), and the confidence from 0 to 1.

    Raises:
        ModuleNotFoundError: The extra ``cleaning`` is not installed.

    >>> identify_language("Das Haus steht am Rande des Waldes.")[0]
    'de'
    """
    language, confidence = _identifier().classify(text)
    return str(language), float(confidence)


def check_language(language: str) -> None:
    """Raise an error for a language that ``identify_language`` cannot return.

    Raises:
        ValueError: The language is unknown.
    """
    known = _identifier().labels
    if language not in known:
        raise ValueError(
            f"language must be a known ISO 639-1 code, got {language!r}: {did_you_mean(language, known)}"
        )


@functools.cache
def _identifier() -> Any:
    require("identifying languages", "py3langid")
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
