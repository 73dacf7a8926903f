"""The multilingual corpus: its components, tokenizer and token stores, and the tokenizer's fertility by language."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import tokenizers

from effscale.command.terminal import status
from effscale.data import (
    BLOOM_TOKENS,
    Document,
    JsonLines,
    Splits,
    StandardLibrary,
    TextFiles,
    fertility,
    prepare_corpus,
    read_tokenizer,
    train_tokenizer,
)
from effscale.data.cache import request_key
from effscale.data.cleaning import (
    Cleaned,
    DatasheetEntry,
    NearDuplicates,
    Quality,
    write_datasheet,
)
from effscale.data.corpus import Corpus
from effscale.data.documents import Source
from effscale.data.sampling import sample_texts
from effscale.data.tokenizer import save_tokenizer
from effscale.experiments.bloom.config import CODE, Config
from effscale.experiments.bloom.messages import InterfaceText
from effscale.locks import locked
from effscale.user_cache import cache_folder

FERTILITY_TOKENS = 1 << 20
"""Number of held-out tokens per component for measuring fertility."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A mixture ready for training.

    Attributes:
        tokenizer: The tokenizer of all components.
        corpora: Corpora by language, code last.
        weights: Share of each corpus in the training rows.
        fertility: Tokens per word in each corpus's held-out text.
        fertility_alone: The same with a tokenizer of equal size that was trained only on this component.
    """

    tokenizer: tokenizers.Tokenizer
    corpora: Mapping[str, Corpus]
    weights: Mapping[str, float]
    fertility: Mapping[str, float]
    fertility_alone: Mapping[str, float]

    @property
    def end_id(self) -> int:
        """The token that ends a document."""
        return next(iter(self.corpora.values())).eos_token_id


def sources(config: Config) -> dict[str, Source]:
    """Return the cleaned source of each component.

    Raises:
        FileNotFoundError: A language has no folder, or its folder has no text.
    """
    cleaning = config.cleaning
    near = cleaning.near_duplicates
    near_duplicates = None if near is None else NearDuplicates(threshold=near)
    found: dict[str, Source] = {}
    for language in config.languages:
        if config.data is None:
            source: Source = InterfaceText(language=language)
        else:
            source = _folder(config.data, language, config.separator)
        quality = Quality(
            min_characters=cleaning.min_characters,
            max_character_repetition=cleaning.max_character_repetition,
            character_ngram=3 if language.startswith(("zh", "ja")) else 10,
            max_word_repetition=None,
            language=language.partition("-")[0] if cleaning.identify_language else None,
        )
        found[language] = Cleaned(source=source, quality=quality, near_duplicates=near_duplicates)
    if config.code:
        # Code is more repetitive than prose, and ROOTS applies other criteria to it.
        quality = Quality(
            min_characters=cleaning.min_characters,
            max_character_repetition=None,
            max_word_repetition=None,
        )
        found[CODE] = Cleaned(
            source=StandardLibrary(), quality=quality, near_duplicates=near_duplicates
        )
    return found


def _folder(data: pathlib.Path, language: str, separator: str | None) -> Source:
    folder = data / language
    found = [pattern for pattern in ("*.txt", "*.jsonl") if any(folder.glob(pattern))]
    if len(found) == 2:
        raise ValueError(f"{folder}: has both *.txt and *.jsonl files. Use one format per language")
    if found:
        paths = str(folder / found[0])
        if found == ["*.txt"]:
            return TextFiles(paths=paths, separator=separator, on_error="skip")
        return JsonLines(paths=paths, on_error="skip")
    there = sorted(path.name for path in data.glob("*") if path.is_dir())
    raise FileNotFoundError(
        f"language {language!r} has no *.txt or *.jsonl file in {folder}; {data} has folders for {', '.join(there) or 'no language'}. "
        "Add its text, or remove it from --languages"
    )


def prepare(config: Config) -> Prepared:
    """Prepare the mixture, or load it from the cache.

    Raises:
        FileNotFoundError: A language has no text.
        ValueError: A language has too little text.
    """
    components = sources(config)
    cache = config.cache or cache_folder("corpora")
    with status("preparing the corpus") as progress:
        splits = Splits(
            fractions={
                "train": 1 - config.validation_fraction,
                "validation": config.validation_fraction,
            }
        )
        every = _Tokenizers(components, splits, config, cache)
        chosen = config.tokenizer
        tokenizer = every(tuple(components)) if chosen is None else read_tokenizer(chosen)
        corpora, cut, alone = {}, {}, {}
        for name, source in components.items():
            progress(name)
            corpora[name] = prepare_corpus(
                source,
                cache,
                tokenizer=tokenizer,
                eos_token="</s>" if config.tokenizer is None else None,
                validation_fraction=config.validation_fraction,
            )
            held_out = list(_held_out(corpora[name], tokenizer))
            cut[name] = fertility(tokenizer, held_out)
            alone[name] = fertility(every((name,)), held_out)
    return Prepared(
        tokenizer=tokenizer,
        corpora=corpora,
        weights=_weights(config, corpora),
        fertility=cut,
        fertility_alone=alone,
    )


class _Tokenizers:
    """Tokenizers of some of the components, from the cache if present."""

    def __init__(
        self,
        components: Mapping[str, Source],
        splits: Splits,
        config: Config,
        cache: pathlib.Path,
    ):
        self._components, self._splits = components, splits
        self._vocab_size, self._code, self._cache = config.vocab_size, config.code, cache
        self._characters = config.tokenizer_characters
        self._samples: dict[str, list[str]] = {}

    def __call__(self, names: Sequence[str]) -> tokenizers.Tokenizer:
        key = request_key(
            {
                "version": 3,
                "characters": self._characters,
                "code": self._code if len(names) > 1 else None,
                "sources": [self._components[name].fingerprint() for name in names],
                "fractions": dict(self._splits.fractions),
                "vocab_size": self._vocab_size,
            }
        )
        file = self._cache / f"bloom-tokenizer-{key}.json"
        with locked(file, f"training {file}"):
            if not file.is_file():
                trained = train_tokenizer(
                    self._mixed(names),
                    vocab_size=self._vocab_size,
                    special_tokens=BLOOM_TOKENS,
                    splitting="bloom",
                )
                save_tokenizer(trained, file)
        return read_tokenizer(file)

    def _mixed(self, names: Sequence[str]) -> list[str]:
        """Return texts of several components; for code only its share, or its words would fill the vocabulary."""
        texts = [text for name in names if name != CODE for text in self._sample(name)]
        if CODE in names:
            code = self._sample(CODE)
            if texts:
                room = int(sum(map(len, texts)) * self._code / (1 - self._code))
                documents = (Document(text, "") for text in code)
                code = sample_texts(documents, max_characters=max(room, 1))
            texts += code
        return texts

    def _sample(self, name: str) -> list[str]:
        if name not in self._samples:  # used by two tokenizers
            texts = sample_texts(self._training(name), max_characters=self._characters)
            self._samples[name] = texts
        return self._samples[name]

    def _training(self, name: str) -> Iterator[Document]:
        for document in self._components[name].documents(log=False):
            if self._splits.assign(document.text) == "train":
                yield document


def _held_out(corpus: Corpus, tokenizer: tokenizers.Tokenizer) -> Iterator[str]:
    store = corpus.validation
    ends = [*store.offsets[1:], store.num_tokens]
    room = FERTILITY_TOKENS
    for start, end in zip(store.offsets, ends, strict=True):
        if room <= 0:
            return
        room -= int(end - start)
        ids = [int(token) for token in store.tokens[start:end]]
        yield tokenizer.decode(ids, skip_special_tokens=True)


def _weights(config: Config, corpora: Mapping[str, Corpus]) -> dict[str, float]:
    sizes = {name: c.train.num_tokens for name, c in corpora.items() if name != CODE}
    total = sum(sizes.values())
    weights = {name: (1 - config.code) * size / total for name, size in sizes.items()}
    return weights | ({CODE: config.code} if config.code else {})


def datasheet(config: Config, prepared: Prepared, folder: pathlib.Path) -> None:
    """Write a description of the corpus into the run folder."""
    license = "Apache-2.0" if config.data is None else config.license
    entries = [
        DatasheetEntry(
            name=name,
            language="Python" if name == CODE else name,
            license="PSF-2.0" if name == CODE else license,
            corpus=corpus,
            weight=prepared.weights[name],
        )
        for name, corpus in prepared.corpora.items()
    ]
    write_datasheet(folder, entries)
