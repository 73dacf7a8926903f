"""The default corpus and its tasks: messages of a home automation's interface, translated by people into many languages."""

import functools
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from effscale.data.documents import Document, SkipReport, Source
from effscale.data.splits import Splits
from effscale.experiments.shared import assets

Split = Literal["train", "validation", "test"]
Place = tuple[str, ...]

_SPLITS = Splits(fractions={"train": 0.8, "validation": 0.1, "test": 0.1})
_PLATFORMS = ("sensor", "switch", "button", "number")


@functools.cache
def messages(language: str) -> Mapping[Place, str]:
    """Return all messages of a language by their place."""
    return assets.interface_messages(language)


def split_of(place: Place) -> str:
    """Return the split of a message; all messages of a component are in the same split, in all languages."""
    return _split_of_component(place[0])


@functools.cache
def _split_of_component(component: str) -> str:
    return _SPLITS.assign(component)


@dataclass(frozen=True, kw_only=True)
class InterfaceText(Source):
    """The messages of one language as text: a document has the messages of one component, without duplicates.
    Components of validation and test are left out.

    Attributes:
        language: The language code.
    """

    language: str

    def _read(self, skipped: SkipReport) -> Iterator[Document]:
        of_component: dict[str, dict[str, None]] = {}
        for place, text in messages(self.language).items():
            if split_of(place) == "train":
                of_component.setdefault(place[0], {})[text] = None
        for component, texts in sorted(of_component.items()):
            yield from self._accept(skipped, "\n".join(texts), f"{self.language}/{component}")

    def spec(self) -> str:
        """A name; ``parse_source`` does not accept it."""
        return f"interface:{self.language}"

    def fingerprint(self) -> dict[str, Any]:
        """Return the language and the version of the package with the messages."""
        return {"source": self.spec(), "version": importlib.metadata.version("homeassistant")}


def examples(task: str, language: str, split: Split) -> list[dict[str, Any]]:
    """Return the labeled examples of a task in a language, always in the same order. Texts that occur in training components are in no other
    split.

    Args:
        task: ``kind``, ``platform``, ``match``, ``continuation`` or ``cloze``.
        language: The language code.
        split: The split.
    """
    every = messages(language)
    here = {place: text for place, text in every.items() if split_of(place) == split}
    if split != "train":
        known = {text for place, text in every.items() if split_of(place) == "train"}
        here = {place: text for place, text in here.items() if text not in known}
    unique = {text: place for place, text in here.items()}
    rng = np.random.default_rng([*task.encode(), *language.encode(), *split.encode()])
    made = _MAKERS[task]({place: text for text, place in unique.items()}, language, rng)
    return [made[i] for i in rng.permutation(len(made))]


def _kind(
    here: Mapping[Place, str], language: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    def label(place: Place) -> str | None:
        if place[1] in ("config", "options") and place[2:3] == ("error",):
            return "error"
        if place[-1] in ("title", "description") and len(place) > 2:
            return place[-1]
        if place[1] == "entity" and place[-1] == "name":
            return "name"
        return "state" if "state" in place[2:-1] else None

    return _balanced(here, label, "kind", rng)


def _platform(
    here: Mapping[Place, str], language: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    def label(place: Place) -> str | None:
        named = place[1] == "entity" and place[-1] == "name"
        return place[2] if named and place[2] in _PLATFORMS else None

    return _balanced(here, label, "platform", rng)


def _balanced(
    here: Mapping[Place, str], label: Any, field: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    of_label: dict[str, list[str]] = {}
    for place, text in here.items():
        if (found := label(place)) is not None:
            of_label.setdefault(found, []).append(text)
    count = min(map(len, of_label.values()), default=0)
    return [
        {"text": texts[i], field: name}
        for name, texts in sorted(of_label.items())
        for i in rng.permutation(len(texts))[:count]
    ]


def _match(
    here: Mapping[Place, str], language: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    if language == "en":
        return []
    english = messages("en")
    pairs = [
        (english[place], text)
        for place, text in here.items()
        if place in english and len(english[place]) >= 15 and english[place] != text
    ]
    # A wrong translation has about the length of the right one.
    pairs.sort(key=lambda pair: len(pair[1]))
    made = []
    for i, (original, text) in enumerate(pairs):
        right = bool(rng.integers(2))
        j = i + int(rng.choice((-3, -2, -1, 1, 2, 3)))
        if not right and (not 0 <= j < len(pairs) or pairs[j][0] == original):
            continue
        made.append(
            {
                "english": original,
                "text": text if right else pairs[j][1],
                "match": "yes" if right else "no",
            }
        )
    return made


def _continuation(
    here: Mapping[Place, str], language: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    halves = []
    for text in here.values():
        words, between = _words(text, language)
        if len(words) >= 8:
            half = len(words) // 2
            halves.append((between.join(words[:half]), between.join(words[half:])))
    # The wrong ending has about the length of the right one, or the sum of log-probabilities would distinguish them.
    halves.sort(key=lambda half: len(half[1]))
    made = []
    for i, (beginning, end) in enumerate(halves):
        j = i + int(rng.choice((-3, -2, -1, 1, 2, 3)))
        other = halves[j][1] if 0 <= j < len(halves) else end
        if other != end:
            ends = [end, other] if rng.integers(2) else [other, end]
            made.append({"beginning": beginning, "end": end, "ends": ends})
    return made


def _cloze(
    here: Mapping[Place, str], language: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    texts = [_words(text, language) for text in here.values()]
    texts = [(words, between) for words, between in texts if len(words) >= 6]
    every = [word for words, _ in texts for word in words if _is_word(word)]
    made = []
    for words, between in texts:
        places = [i for i, word in enumerate(words) if _is_word(word)]
        if not places:
            continue
        place = int(rng.choice(places))
        word, other = words[place], every[int(rng.integers(len(every)))]
        if word.casefold() != other.casefold():
            choices = [word, other] if rng.integers(2) else [other, word]
            gap = between.join([*words[:place], "_", *words[place + 1 :]])
            made.append({"text": gap, "word": word, "words": choices})
    return made


def _words(text: str, language: str) -> tuple[Sequence[str], str]:
    """Return a text's words and their separator; for languages without spaces between words, pairs of characters."""
    if language.startswith(("zh", "ja", "th")):
        return [text[i : i + 2] for i in range(0, len(text), 2)], ""
    return text.split(), " "


def _is_word(word: str) -> bool:
    return word.isalpha() and (len(word) >= 4 or not word.isascii())


_MAKERS = {
    "kind": _kind,
    "platform": _platform,
    "match": _match,
    "continuation": _continuation,
    "cloze": _cloze,
}
TASKS = tuple(_MAKERS)
