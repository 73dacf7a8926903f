"""The tokenizer of a folder, from whichever files, against transformers' of the same folder."""

import json
import pathlib

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from effscale import data
from effscale.data.tokenizer import save_tokenizer
from effscale.interop import FolderError, load_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  Two spaces, a\ttab\nand a line;   don't won't it's 3.14 1,000 2024-11-24",
    "Où naïve façade — “quotes” … Ångström ﬁne Ⅷ ½",
    "中文字符 と 日本語 한국어 العربية हिन्दी",
    "emoji 😀👩‍👩‍👧 zero\u200bwidth e\u0301 combining \u00a0space \ufeff",
    "def f(x):\n    return x**2  # comment\r\n<b>html</b> &amp; http://a.b/c?d=e#f",
    "<|endoftext|> inside, [MASK] and [SEP] too, <s>",
    "",
    " ",
]  # fmt: skip
texts = st.text() | st.text("aeiou nrstl.'<|>[]\n", max_size=60)


@pytest.fixture(scope="module")
def auto():
    hf = pytest.importorskip("transformers", reason="the oracle is transformers' tokenizers")
    return hf.AutoTokenizer.from_pretrained


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A folder with a tokenizer.json, and one with the same as vocab.json and merges.txt."""
    whole, parts = (tmp_path_factory.mktemp(name) for name in ("json", "parts"))
    tokenizer = data.train_tokenizer(TEXTS * 3, vocab_size=320)
    save_tokenizer(tokenizer, whole)
    tokenizer.model.save(str(parts))
    config(whole, "gpt2", 320)
    config(parts, "gpt2", 320)
    return whole, parts


@pytest.fixture(scope="module")
def word_piece(tmp_path_factory):
    """A folder with a vocab.txt."""
    folder = tmp_path_factory.mktemp("bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=260, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.model.save(str(folder))
    config(folder, "bert", 400)
    return folder


def config(folder: pathlib.Path, model_type: str, vocab_size: int) -> None:
    fields = {"model_type": model_type, "vocab_size": vocab_size}
    (folder / "config.json").write_text(json.dumps(fields))


def check(ours, theirs, text):
    assert ours.encode(text).ids == theirs(text)["input_ids"]
    plain = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text, add_special_tokens=False).ids == plain


def check_all(folder, auto):
    ours, theirs = load_tokenizer(folder), auto(folder)

    @given(texts)
    def on_any(text):
        check(ours, theirs, text)

    for text in TEXTS:
        on_any = example(text)(on_any)
    on_any()
    assert ours.get_vocab() == theirs.get_vocab()
    return ours, theirs


def test_tokenizer_json(byte_level, auto):
    ours, theirs = check_all(byte_level[0], auto)
    for text in TEXTS:
        assert ours.decode(ours.encode(text).ids) == theirs.decode(
            theirs(text)["input_ids"], skip_special_tokens=True
        )


def test_vocabulary_and_merges(byte_level, auto):
    ours, _ = check_all(byte_level[1], auto)
    whole = load_tokenizer(byte_level[0])
    for text in TEXTS:
        assert ours.encode(text).ids == whole.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == whole.decode(whole.encode(text).ids)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"tokenize_chinese_chars": False},
    ],
)
def test_word_piece(word_piece, settings, tmp_path, auto):
    for name in ("vocab.txt", "config.json"):
        (tmp_path / name).write_bytes((word_piece / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = check_all(tmp_path, auto)
    pair = theirs("The fox", "the dog")
    assert ours.encode("The fox", "the dog").ids == pair["input_ids"]
    assert ours.encode("The fox", "the dog").type_ids == pair["token_type_ids"]


OPT = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True} | {
    f"{role}_token": {"__type": "AddedToken", "content": "</s>", "normalized": True}
    for role in ("bos", "eos", "unk")
}  # fmt: skip
LISTED = {"additional_special_tokens": ["[X1]", "<x2>"]}
NEW = {"content": "[X1]", "lstrip": True, "normalized": False, "special": True}
MASK = {"content": "[MASK]", "lstrip": True, "normalized": True}
SPECIAL = "</s> a <s> b <pad> <unk> c [X1] <x2>  <|endoftext|> [MASK]. x<x2>y [x1] [cls]"
# tokenizer_config.json, special_tokens_map.json, added_tokens.json; `first` stands for the first free id.
BESIDE = {
    "gpt2": [
        [{"add_prefix_space": True}],
        [OPT],
        [OPT, {"bos_token": "</s>", "pad_token": "<pad>"}],
        [{"add_bos_token": True, "add_eos_token": True}],
        [LISTED],
        [{}, LISTED],
        [{"extra_special_tokens": {"image_token": "[X1]"}, "audio_token": "<x2>"}],
        [{"pad_token": "[X1]"}, {}, {"[X1]": "first", "<x2>": "second"}],
        [{"added_tokens_decoder": {"first": NEW}}, {"pad_token": "not read then"}],
    ],
    "bert": [
        [LISTED],
        [LISTED | {"do_lower_case": False}],
        [{}, LISTED],
        [{}, {"mask_token": MASK}],
        [{}, {}, {"[X1]": "first"}],
        [{"cls_token": "[SEP]", "sep_token": "[CLS]", "pad_token": "[X1]"}],
        [{"added_tokens_decoder": {"first": NEW}}],
    ],
}


@pytest.mark.parametrize(
    ("kind", "number"), [(k, i) for k in BESIDE for i in range(len(BESIDE[k]))]
)
def test_settings_beside_a_vocabulary(kind, number, byte_level, word_piece, tmp_path, auto):
    original = word_piece if kind == "bert" else byte_level[1]
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config(tmp_path, kind, 400)
    size = load_tokenizer(tmp_path).get_vocab_size(with_added_tokens=False)
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    for name, fields in zip(names, BESIDE[kind][number], strict=False):
        text = json.dumps(fields).replace('"first":', f'"{size}":')
        text = text.replace('"first"', str(size)).replace('"second"', str(size + 1))
        (tmp_path / name).write_text(text)
    ours, theirs = load_tokenizer(tmp_path), auto(tmp_path)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in (*TEXTS, SPECIAL):
        check(ours, theirs, text)
        pair = theirs(text, "the dog", return_token_type_ids=True)
        assert ours.encode(text, "the dog").ids == pair["input_ids"]
        assert ours.encode(text, "the dog").type_ids == pair["token_type_ids"]


def test_truncation_and_padding_of_the_file_are_off(byte_level, tmp_path, auto):
    tokenizer = data.read_tokenizer(byte_level[0])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5, pad_token="<|endoftext|>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config(tmp_path, "gpt2", 320)
    assert len(tokenizer.encode(TEXTS[0]).ids) == 5
    theirs = auto(tmp_path)
    for ours in (load_tokenizer(tmp_path), data.read_tokenizer(tmp_path)):
        for text in TEXTS:
            check(ours, theirs, text)


@pytest.mark.parametrize("settings", [{"add_prefix_space": True}, LISTED])
def test_settings_beside_a_tokenizer_json(settings, byte_level, tmp_path, auto):
    (tmp_path / "tokenizer.json").write_bytes((byte_level[0] / "tokenizer.json").read_bytes())
    config(tmp_path, "gpt2", 400)
    settings = settings | {"tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_tokenizer(tmp_path), auto(tmp_path)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in (*TEXTS, SPECIAL):
        check(ours, theirs, text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "RobertaTokenizer"}, "names a 'RobertaTokenizer'.* AutoTokenizer"),
        ({"add_prefix_space": "yes"}, "add_prefix_space must be true or false.*, got 'yes'"),
        (
            {"bos_token": 5},
            r"tokenizer_config\.json': a token must be a string or an object, got 5",
        ),
        (
            {"pad_token": {"lstrip": True}},
            r"tokenizer_config\.json': content is missing; it must be a string",
        ),
        (
            {"additional_special_tokens": "<x>"},
            r"tokenizer_config\.json': special tokens must be a list, got '<x>'",
        ),
        ({"added_tokens_decoder": {"one": NEW}}, "cannot be read: invalid literal"),
        (
            {"added_tokens_decoder": {"9": NEW}},
            r"gives '\[X1\]' the id 9, but the next free one is",
        ),
    ],
)
def test_settings_that_are_refused(settings, message, byte_level, tmp_path):
    for path in byte_level[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(FolderError, match=message):
        load_tokenizer(tmp_path)


def test_a_text_before_all_else_in_opt(byte_level, tmp_path, auto):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((byte_level[1] / name).read_bytes())
    config(tmp_path, "opt", 320)
    end = "<|endoftext|>"
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": end, "unk_token": end, "eos_token": end}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = load_tokenizer(tmp_path)
    plain = load_tokenizer(byte_level[1])
    theirs = auto(tmp_path)
    for text in TEXTS:
        assert ours.encode(text).ids == [plain.token_to_id(end), *plain.encode(text).ids]
        assert ours.encode(text).ids == theirs(text)["input_ids"]


def test_what_is_taken_without_transformers(byte_level, word_piece):
    for folder in (*byte_level, word_piece):
        tokenizer = load_tokenizer(folder)
        for text in TEXTS:
            ids = tokenizer.encode(text).ids
            assert max(ids, default=0) < tokenizer.get_vocab_size()
        assert tokenizer.decode(tokenizer.encode("the lazy dog").ids) == "the lazy dog"


def test_more_tokens_than_embeddings(byte_level, word_piece, tmp_path):
    for folder in (*byte_level, word_piece):
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        size = load_tokenizer(tmp_path).get_vocab_size()
        config(tmp_path, "gpt2", size)
        load_tokenizer(tmp_path)
        config(tmp_path, "gpt2", size - 1)
        with pytest.raises(
            FolderError, match=f"ids up to {size - 1}, .* vocab_size={size - 1} emb"
        ):
            load_tokenizer(tmp_path)
        for path in tmp_path.iterdir():
            path.unlink()


def test_nothing_there(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        FolderError,
        match=r"no tokenizer .* was found; the folder contains \['model.safetensors'\]$",
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(FolderError, match="there is no folder"):
        load_tokenizer(tmp_path / "elsewhere")


def test_a_sentencepiece_model_alone(tmp_path):
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(
        FolderError, match=r"no tokenizer .*converts tokenizer.model to tokenizer.json"
    ):
        load_tokenizer(tmp_path)


def test_a_vocabulary_without_its_merges(byte_level, tmp_path):
    (tmp_path / "vocab.json").write_bytes((byte_level[1] / "vocab.json").read_bytes())
    with pytest.raises(
        FolderError, match=r"no tokenizer .* was found; the folder contains \['vocab.json'\]"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1}', "not json", "<html>"])
def test_a_tokenizer_json_that_is_none(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(FolderError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_without_what_bert_needs(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nthe\n")
    with pytest.raises(FolderError, match=r"has no \[CLS\], \[SEP\]"):
        load_tokenizer(tmp_path)
