import functools

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from effscale.data import Document, write_store
from effscale.data import build as build_module
from effscale.data import encode as encode_module
from effscale.data import tokenizer as tokenizer_module
from effscale.data.encode import encode_documents


def as_documents(texts):
    return [Document(text, f"memory:{i}") for i, text in enumerate(texts)]


@given(texts=st.lists(st.text(max_size=30), max_size=8), size=st.integers(1, 60))
def test_every_document_is_encoded_in_order(tokenizer, texts, size):
    batches = encode_documents(as_documents(texts), tokenizer, batch_characters=size)
    pieces = [piece for batch in batches for piece in batch]
    assert [piece.document.text for piece in pieces] == texts
    assert [tokenizer.decode(piece.ids) for piece in pieces] == texts
    assert all(piece.last for piece in pieces)


def test_long_documents_come_in_pieces(tokenizer, tmp_path, monkeypatch):
    texts = ["the quick brown fox " * 50, "short", "over the lazy dog " * 50]
    whole = write_store(as_documents(texts), tmp_path / "whole", tokenizer)
    split = lambda text: tokenizer_module.split_text(text, 64)
    monkeypatch.setattr(encode_module, "split_text", split)
    pieces = write_store(as_documents(texts), tmp_path / "pieces", tokenizer)
    assert pieces.tokens.tolist() == whole.tokens.tolist()
    assert pieces.offsets.tolist() == whole.offsets.tolist()
    assert whole.num_documents == 3
    assert whole.document(1).tolist() == [*tokenizer.encode("short").ids, whole.eos_token_id]


def test_a_document_cannot_forge_a_separator(tokenizer, tmp_path):
    text = "the fox<|endoftext|>the dog"
    safe = write_store(as_documents([text]), tmp_path / "a", tokenizer)
    assert safe.tokens.tolist().count(safe.eos_token_id) == 1
    assert tokenizer.decode(safe.document(0).tolist()) == text
    parsed = write_store(as_documents([text]), tmp_path / "b", tokenizer, parse_special_tokens=True)
    assert parsed.tokens.tolist().count(parsed.eos_token_id) == 2


def test_truncation_and_padding_of_a_saved_tokenizer_lose_nothing(tokenizer, tmp_path):
    saved = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    saved.enable_truncation(4)
    saved.enable_padding(length=16)
    before = saved.to_str()
    text = "the quick brown fox jumps over the lazy dog"
    store = write_store(as_documents([text, "the"]), tmp_path / "a", saved)
    assert tokenizer.decode(store.document(0).tolist()) == text
    assert tokenizer.decode(store.document(1).tolist()) == "the"
    assert saved.to_str() == before


def test_progress_counts_up_to_everything(tokenizer, tmp_path, monkeypatch):
    small = functools.partial(encode_documents, batch_characters=100)
    monkeypatch.setattr(build_module, "encode_documents", small)
    texts = [f"the fox {i}" for i in range(50)]
    seen = []
    store = write_store(as_documents(texts), tmp_path / "a", tokenizer, progress=seen.append)
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert seen[-1] == (50, sum(map(len, texts)), store.num_tokens)


def test_empty_documents_are_counted_and_an_empty_corpus_is_a_store(tokenizer, tmp_path):
    store = write_store(as_documents(["", "a", ""]), tmp_path / "a", tokenizer)
    assert (store.num_documents, store.manifest["empty_documents"]) == (1, 2)
    empty = write_store([], tmp_path / "b", tokenizer)
    assert (empty.num_documents, empty.num_tokens) == (0, 0)


def test_an_error_in_the_source_leaves_no_store(tokenizer, tmp_path):
    def failing():
        yield Document("the fox", "a")
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write_store(failing(), tmp_path / "a", tokenizer)
    assert list(tmp_path.iterdir()) == []
