"""A small tokenizer and a way to make token stores."""

import itertools

import pytest

from effscale.data import TokenStore, train_tokenizer
from effscale.data.writer import TokenStoreWriter


@pytest.fixture(scope="session")
def tokenizer():
    texts = ["the quick brown fox jumps over the lazy dog\n", "def add(a, b):\n    return a + b\n"]
    return train_tokenizer(texts * 20, vocab_size=300)


@pytest.fixture(scope="session")
def make_store(tmp_path_factory):
    """Writes lists of ids as the documents of a store; session-wide, so that hypothesis may use it."""
    names = itertools.count()
    folder = tmp_path_factory.mktemp("stores")

    def make(documents, vocab_size=1000, eos_token_id=None, **options):
        target = folder / str(next(names))
        with TokenStoreWriter(
            target, vocab_size=vocab_size, eos_token_id=eos_token_id, **options
        ) as writer:
            for document in documents:
                writer.add_document(document)
        return TokenStore.open(target)

    return make
