import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from effscale.data import BLOOM_TOKENS, fertility, read_tokenizer, train_tokenizer
from effscale.data.tokenizer import save_tokenizer, separator_id, split_text, tokenizer_digest


@given(text=st.text(max_size=80))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_is_deterministic_and_special_tokens_come_first():
    texts = [f"word{i % 7} and word{i % 11} in line {i}\n" for i in range(300)]
    special = ("<|endoftext|>", "<|pad|>")
    first = train_tokenizer(texts, vocab_size=320, special_tokens=special)
    second = train_tokenizer(iter(texts), vocab_size=320, special_tokens=special)
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 320
    assert [first.id_to_token(i) for i in range(2)] == list(special)


MANY = [
    "def f(x2, y):\n\treturn x2  ** y|0  # twice!",
    "Le chat, c'est-à-dire l'animal, dort… (2022)",
    "他说\uff1a你好\uff0c世界。天气、很好。",
    "नमस्ते दुनिया। कैसे हो? سلام دنیا\u06d4 مرحبا، كيف",
    "   three spaces\u00a0and\u3000wide ones\n\n",
]


@pytest.fixture(scope="module")
def bloom():
    return train_tokenizer(MANY * 3, vocab_size=320, splitting="bloom", special_tokens=BLOOM_TOKENS)


def pieces_of(pre_tokenizer, text):
    return [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]


@given(text=st.one_of(st.text(max_size=60), st.sampled_from(MANY)))
def test_bloom_splits_as_the_original_does(bloom, text):
    """The pattern as BLOOM's tokenizer.json has it, whose brackets within brackets mean a union."""
    original = tokenizers.Regex(" ?[^(\\s|[.,!?…。\uff0c、।\u06d4،])]+")
    split = tokenizers.pre_tokenizers.Split(original, "isolated")
    assert pieces_of(bloom.pre_tokenizer, text) == pieces_of(split, text)
    assert bloom.decode(bloom.encode(text).ids) == text


def test_bloom_splits_by_hand(bloom, tokenizer):
    """Letters, digits and signs of code stay together, punctuation stands alone; GPT-2 cuts them."""
    text = "a_b2=f  x1, don't。"
    words = ["a_b2=f", " ", " x1", ",", " don't", "。"]
    assert pieces_of(bloom.pre_tokenizer, text) == words
    assert pieces_of(tokenizer.pre_tokenizer, text)[:3] == ["a", "_", "b"]
    assert [bloom.id_to_token(i) for i in range(4)] == list(BLOOM_TOKENS)


def test_fertility(bloom):
    """Tokens of all texts by words of all texts; a tokenizer of another language cuts finer."""
    english, other = ["the cat and the dog"] * 5, ["кот и собака"] * 5
    own = train_tokenizer(english, vocab_size=290)
    assert fertility(own, english) < 2 < fertility(own, other)
    count = sum(len(own.encode(text).ids) for text in (*english, *other))
    assert fertility(own, [*english, *other]) == count / (5 * 5 + 5 * 3)
    with pytest.raises(ValueError, match="no word"):
        fertility(own, [" \n"])


def test_impossible_training_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257 .*got 256"):
        train_tokenizer(["a"], vocab_size=256)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(iter([]), vocab_size=300)
    untyped = train_tokenizer.__wrapped__  # a caller whose types nobody checks
    with pytest.raises(
        ValueError, match=r"splitting must be one of \('gpt2', 'bloom'\), got 'llama'"
    ):
        untyped(["a"], vocab_size=300, splitting="llama")
    with pytest.raises(ValueError, match=r"texts must be several texts, got the text 'abc'"):
        train_tokenizer("abc", vocab_size=300)
    with pytest.raises(ValueError, match=r"special_tokens must be several texts"):
        train_tokenizer(["abc"], vocab_size=300, special_tokens="<s>")


def test_save_and_load_by_file_or_folder(tokenizer, tmp_path):
    file = save_tokenizer(tokenizer, tmp_path / "made" / "here")
    assert file == tmp_path / "made" / "here" / "tokenizer.json"
    assert [entry.name for entry in file.parent.iterdir()] == ["tokenizer.json"]
    for path in (file, file.parent):
        assert tokenizer_digest(read_tokenizer(path)) == tokenizer_digest(tokenizer)
    assert save_tokenizer(tokenizer, tmp_path / "x.json") == tmp_path / "x.json"


def test_a_file_saved_with_truncation_and_padding_encodes_whole_texts(tokenizer, tmp_path):
    saved = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    saved.enable_truncation(2)
    saved.enable_padding(length=3)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(tmp_path).to_str() == tokenizer.to_str()


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer not found"):
        read_tokenizer(tmp_path / ("x" * 5000))
    with pytest.raises(FileNotFoundError, match="absent or empty"):
        read_tokenizer(tmp_path / "nowhere" / "tokenizer.json")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"the folder contains \['vocab.json'\]"):
        read_tokenizer(tmp_path)
    for content in ("{", json.dumps({"model": 1})):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"not a tokenizer.json"):
            read_tokenizer(tmp_path)


def test_separator_is_found_or_named(tokenizer):
    assert separator_id(tokenizer) == 0
    other = train_tokenizer(["text"], vocab_size=270, special_tokens=["<pad>", "</s>"])
    assert separator_id(other) == other.token_to_id("</s>") == 1
    assert separator_id(other, "<pad>") == 0
    with pytest.raises(ValueError, match=r"no token '<pda>'.*<pad>"):
        separator_id(other, "<pda>")
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    with pytest.raises(ValueError, match="no usual end-of-document token"):
        separator_id(bare)


words = st.text(alphabet="ab1 \n\t.é三'", max_size=120)


@given(text=words, limit=st.integers(1, 20))
def test_pieces_join_to_the_text(text, limit):
    pieces = split_text(text, limit)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


@given(
    words=st.lists(st.sampled_from(["the ", "fox\n", "dog", "\n\n", "  (a, b):", ".\n", "é", " 3"]))
)
def test_long_texts_are_encoded_as_the_whole(tokenizer, words):
    text = "".join(word + "the " for word in words)
    ids = [token for piece in split_text(text, 24) for token in tokenizer.encode(piece).ids]
    assert ids == tokenizer.encode(text).ids
