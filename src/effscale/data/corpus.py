"""From sources to a tokenizer and token stores in one call, with a cache."""

import contextlib
import itertools
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from effscale.atomic import atomic_folder
from effscale.data.build import Progress, write_splits
from effscale.data.cache import request_key
from effscale.data.corpus_tokenizer import corpus_tokenizer
from effscale.data.documents import Document, SkipReport, Source
from effscale.data.splits import Splits
from effscale.data.store import CorruptTokenStoreError, TokenStore, Verify
from effscale.data.tokenizer import (
    read_tokenizer,
    save_tokenizer,
    separator_id,
    tokenizer_digest,
)
from effscale.locks import locked
from effscale.paths import local_path

logger = logging.getLogger(__name__)

SAMPLE_CHARACTERS = 32 << 20
_REQUEST = "corpus.json"
_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus ready for training.

    Attributes:
        tokenizer: The tokenizer of the corpus.
        train: The training documents.
        validation: The held-out documents.
        eos_token_id: The token that ends each document.
        folder: The folder that contains the corpus.
        skipped: The documents that were left out when the corpus was built.
        num_bytes: The size of the text in UTF-8 bytes.
    """

    tokenizer: tokenizers.Tokenizer
    train: TokenStore
    validation: TokenStore
    eos_token_id: int
    folder: pathlib.Path
    skipped: dict[str, Any]
    num_bytes: int

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the vocabulary."""
        return self.train.vocab_size


def prepare_corpus(
    sources: Source | Sequence[Source],
    folder: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    tokenizer: tokenizers.Tokenizer | str | os.PathLike[str] | None = None,
    validation_fraction: float = 0.05,
    seed: int = 0,
    sample_characters: int = SAMPLE_CHARACTERS,
    eos_token: str | None = None,
    parse_special_tokens: bool = False,
    verify: Verify = "once",
    progress: Callable[[Progress], object] | None = None,
) -> Corpus:
    """Train or load a tokenizer and write token stores of the documents, or reopen cached ones.

    The result is written to ``corpus-<key>`` in ``folder``. The key is a hash of everything the result depends on: the sources,
    the sizes and times of their files, the tokenizer and the split. A later call with the same arguments opens the existing
    result; a call with other arguments does not touch it. A damaged corpus is built again, with a warning in the log. If several
    processes make the same request at the same time, one builds and the others wait.

    Args:
        sources: The corpus; several sources are read one after another.
        folder: The cache folder.
        vocab_size: Train a byte-level BPE of this size on the training documents.
        tokenizer: Or use this tokenizer (a path names a ``tokenizer.json`` or its folder).
        validation_fraction: The share of documents to hold out, chosen by the hash of their text.
        seed: Seed for which documents are held out and which are sampled.
        sample_characters: Train the tokenizer on a random sample of the training documents of this total size, with the same
            share from each source.
        eos_token: The token to append to each document; None uses the tokenizer's end-of-document token.
        parse_special_tokens: Whether the name of a special token in a text is encoded as that token.
        verify: How to check an existing corpus, see `TokenStore.open`.
        progress: Called as the stores are written.

    Raises:
        ValueError: An argument is out of range, or a split would be empty.
        DocumentError: A document is unusable and its source does not skip it.
        DiskFullError: The disk is full; no partial corpus is left behind.
    """
    sources = _as_tuple(sources)
    folder = local_path(folder).absolute()
    splits = _splits(validation_fraction, seed)
    chosen = corpus_tokenizer(sources, folder, splits, vocab_size, tokenizer, sample_characters)
    request = {
        "version": _VERSION,
        "sources": [source.fingerprint() for source in sources],
        "tokenizer": tokenizer_digest(chosen),
        "validation_fraction": validation_fraction,
        "seed": seed,
        "eos_id": separator_id(chosen, eos_token),
        "parse_special_tokens": parse_special_tokens,
    }
    target = folder / f"corpus-{request_key(request)}"
    with locked(target, f"building {target}"):
        if target.exists():
            try:
                return _open(target, verify)
            except (CorruptTokenStoreError, OSError, ValueError, KeyError) as error:
                logger.warning("%s is damaged and is built again: %s", target, error)
        # Not every file system supports locks, so another process may have finished first.
        with contextlib.suppress(FileExistsError), atomic_folder(target, overwrite=True) as work:
            skipped, size = SkipReport(), _Size()
            stores = write_splits(
                size.of(_read(sources, skipped)),
                {name: work / name for name in splits.fractions},
                chosen,
                splits=splits,
                eos_token=eos_token,
                parse_special_tokens=parse_special_tokens,
                metadata={"sources": [source.spec() for source in sources]},
                progress=progress,
            )
            _check_sizes(stores, splits, sources, skipped)
            save_tokenizer(chosen, work)
            content = {
                "request": request,
                "skipped": skipped.as_dict(),
                "num_bytes": size.num_bytes,
            }
            (work / _REQUEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return _open(target, "size")


def prepare_mixture(
    sources: Sequence[Source],
    folder: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    tokenizer: tokenizers.Tokenizer | str | os.PathLike[str] | None = None,
    validation_fraction: float = 0.05,
    seed: int = 0,
    sample_characters: int = SAMPLE_CHARACTERS,
    **options: Any,
) -> tuple[Corpus, ...]:
    """Prepare each source as a separate corpus, all with the same tokenizer.

    To train on a weighted mixture, use ``make_dataset([c.train for c in corpora], weights=...)``.

    Args:
        sources: The components.
        folder: The cache folder.
        vocab_size: Train a tokenizer of this size on a sample of all components.
        tokenizer: Or use this tokenizer.
        validation_fraction: The share of each component's documents to hold out.
        seed: As in `prepare_corpus`.
        sample_characters: As in `prepare_corpus`.
        **options: Further arguments of `prepare_corpus`.

    Returns:
        The corpora, in the order of the sources.
    """
    sources = _as_tuple(sources)
    folder = local_path(folder).absolute()
    splits = _splits(validation_fraction, seed)
    chosen = corpus_tokenizer(sources, folder, splits, vocab_size, tokenizer, sample_characters)
    return tuple(
        prepare_corpus(
            source,
            folder,
            tokenizer=chosen,
            validation_fraction=validation_fraction,
            seed=seed,
            **options,
        )
        for source in sources
    )


def _as_tuple(sources: Source | Sequence[Source]) -> tuple[Source, ...]:
    result = (sources,) if isinstance(sources, Source) else tuple(sources)
    if not result:
        raise ValueError("sources must have at least one source, got []")
    return result


def _splits(validation_fraction: float, seed: int) -> Splits:
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction must be at least 0 and below 1, got {validation_fraction}"
        )
    return Splits(
        fractions={"train": 1 - validation_fraction, "validation": validation_fraction}, seed=seed
    )


def _read(sources: tuple[Source, ...], skipped: SkipReport) -> Iterator[Document]:
    return itertools.chain.from_iterable(source.documents(skipped) for source in sources)


class _Size:
    """Counts the bytes of documents that pass through."""

    num_bytes = 0

    def of(self, documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            self.num_bytes += len(document.text.encode())
            yield document


def _check_sizes(
    stores: dict[str, TokenStore],
    splits: Splits,
    sources: tuple[Source, ...],
    skipped: SkipReport,
) -> None:
    counts = {name: store.num_documents for name, store in stores.items()}
    total = sum(counts.values())
    specs = ", ".join(source.spec() for source in sources)
    if not total:
        raise ValueError(f"the corpus {specs} has no documents: {skipped}")
    for name, count in counts.items():
        if not count and splits.fractions[name] > 0:
            raise ValueError(
                f"the corpus {specs} has {total} documents, and none of them fell to {name} "
                f"(fraction {splits.fractions[name]:g}); {skipped}. Use more documents (with TextFiles, set a "
                "separator to get several documents per file), another fraction or another seed."
            )


def _open(target: pathlib.Path, verify: Verify) -> Corpus:
    content = json.loads((target / _REQUEST).read_text(encoding="utf-8"))
    tokenizer = read_tokenizer(target)
    stores = {
        name: TokenStore.open(target / name, verify=verify) for name in ("train", "validation")
    }
    digest = tokenizer_digest(tokenizer)
    for store in stores.values():
        if store.manifest["tokenizer"] != digest:
            raise CorruptTokenStoreError(
                target / "tokenizer.json", f"digest {store.manifest['tokenizer']}", digest
            )
    return Corpus(
        tokenizer=tokenizer,
        train=stores["train"],
        validation=stores["validation"],
        eos_token_id=content["request"]["eos_id"],
        folder=target,
        skipped=content["skipped"],
        num_bytes=content["num_bytes"],
    )
