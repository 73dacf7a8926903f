"""Which language a text is in, by py3langid, whose model of 97 languages is inside its package."""

import functools
from typing import Any

from effscale.models.validation import did_you_mean


def identify_language(text: str) -> tuple[str, float]:
    """The language of a text, and the confidence in it.

    Short texts are often taken for a related language.

    Args:
        text: The text.

    Returns:
        The code of ISO 639-1 (``en``, ``zh``), and a confidence from 0 to 1.

    Raises:
        ModuleNotFoundError: The extra ``cleaning`` is not installed.

    >>> identify_language("Das Haus steht am Rande des Waldes.")[0]
    'de'
    """
    language, confidence = _identifier().classify(text)
    return str(language), float(confidence)


def check_language(language: str) -> None:
    """Refuses a language that :func:`identify_language` never finds.

    Raises:
        ValueError: The language is not known.
    """
    known = _identifier().labels
    if language not in known:
        raise ValueError(f"language={language!r}: {did_you_mean(language, known)}")


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError as error:
        error.add_note(
            "Identifying languages needs py3langid: install it with pip install py3langid"
        )
        raise
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
