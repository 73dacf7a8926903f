"""The tokenizer of a corpus, trained once and cached."""

import logging
import os
import pathlib

import tokenizers

from effscale.data.cache import request_key
from effscale.data.documents import SkipReport, Source
from effscale.data.sampling import sample_texts
from effscale.data.splits import Splits
from effscale.data.tokenizer import read_tokenizer, save_tokenizer, train_tokenizer
from effscale.locks import locked

logger = logging.getLogger(__name__)


def corpus_tokenizer(
    sources: tuple[Source, ...],
    folder: pathlib.Path,
    splits: Splits,
    vocab_size: int | None,
    tokenizer: tokenizers.Tokenizer | str | os.PathLike[str] | None,
    sample_characters: int,
) -> tokenizers.Tokenizer:
    """Return the given tokenizer, or one trained on these sources, now or by an earlier call.

    A trained tokenizer is cached in ``folder`` under a hash of what it depends on. It is trained on a random sample of the
    training documents, of ``sample_characters`` in total, with the same share from each source.

    Raises:
        ValueError: Both or neither of ``vocab_size`` and ``tokenizer`` are given, or there are no training documents.
    """
    if (vocab_size is None) == (tokenizer is None):
        raise ValueError(
            "pass either vocab_size, to train a tokenizer, or tokenizer, to use one, "
            f"got vocab_size={vocab_size} and tokenizer={tokenizer!r}"
        )
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return tokenizer
    if tokenizer is not None:
        return read_tokenizer(tokenizer)
    assert vocab_size is not None
    key = request_key(
        {
            "sources": [source.fingerprint() for source in sources],
            "vocab_size": vocab_size,
            "fractions": dict(splits.fractions),
            "seed": splits.seed,
            "sample_characters": sample_characters,
        }
    )
    file = folder / f"tokenizer-{key}.json"
    with locked(file, f"training {file}"):
        if file.exists():
            try:
                return read_tokenizer(file)
            except ValueError as error:
                logger.warning("%s is damaged and is trained again: %s", file, error)
        texts = _training_texts(sources, splits, sample_characters)
        trained = train_tokenizer(texts, vocab_size=vocab_size)
        if trained.get_vocab_size() < vocab_size:
            logger.warning(
                "the text yields only %d of the %d requested tokens; the vocabulary has %d",
                trained.get_vocab_size(), vocab_size, trained.get_vocab_size(),
            )  # fmt: skip
        save_tokenizer(trained, file)
        # Return it as read back, so that a later run that loads it computes the same key.
        return read_tokenizer(file)


def _training_texts(
    sources: tuple[Source, ...], splits: Splits, sample_characters: int
) -> list[str]:
    texts, skipped = [], SkipReport()
    for source in sources:
        training = (
            document
            for document in source.documents(skipped, log=False)
            if splits.assign(document.text) == "train"
        )
        texts += sample_texts(
            training, max_characters=max(1, sample_characters // len(sources)), seed=splits.seed
        )
    if not texts:
        specs = ", ".join(source.spec() for source in sources)
        raise ValueError(
            f"no text to train a tokenizer on: {specs} has no training documents; {skipped}"
        )
    return texts
