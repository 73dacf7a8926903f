"""Tokenizers: train a byte-level BPE, load any ``tokenizer.json``, save one."""

import difflib
import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import tokenizers

from effscale.atomic import atomic_file

DEFAULT_SEPARATOR = "<|endoftext|>"

Splitting = Literal["gpt2", "bloom"]
"""How a text falls into words, beyond which no token reaches."""

BLOOM_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
"""BLOOM's special tokens, in the order of their ids."""

# A word holds no white space, round bracket, bar, or mark that ends a clause in the scripts of BLOOM's languages.
_BLOOM_WORD = " ?[^()|\\s.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c]+"

# The names under which published tokenizers keep the token that ends a document.
_SEPARATORS = (
    DEFAULT_SEPARATOR,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "[SEP]",
)


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = (DEFAULT_SEPARATOR,),
    splitting: Splitting = "gpt2",
) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE, the algorithm of GPT-2; the same texts give the same tokenizer.

    Every string can be encoded and is decoded to itself: the 256 bytes are tokens. For a tokenizer like BLOOM's give
    ``splitting="bloom", special_tokens=BLOOM_TOKENS``.

    Args:
        texts: The training texts; they are streamed and not kept.
        vocab_size: The number of tokens, special ones and the 256 bytes included. Texts with little
            variety may give fewer.
        special_tokens: They get the first ids, in this order.
        splitting: ``"gpt2"`` keeps letters, digits, other signs and white space apart. ``"bloom"`` ends words at white space, round
            brackets, the bar and the full stops, commas and question marks of several scripts only, so that letters, digits and signs of code may share a token, and so may spaces.

    Returns:
        A fast tokenizer.

    Raises:
        ValueError: ``vocab_size`` has no room for the bytes and special tokens, there is no text, or ``splitting`` is unknown.

    References:
        Le Scao et al., "BLOOM", 2022, section 3.3.

    >>> tokenizer = train_tokenizer(["low lower lowest"] * 4, vocab_size=262)
    >>> tokenizer.decode(tokenizer.encode("lower").ids)
    'lower'
    """
    smallest = 256 + len(set(special_tokens))
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size}: a byte-level BPE needs at least {smallest} "
            f"(256 bytes and {len(set(special_tokens))} special tokens)."
        )
    if splitting not in get_args(Splitting):
        raise ValueError(f"splitting={splitting!r}: must be one of {get_args(Splitting)}")
    seen = 0

    def pieces():
        nonlocal seen
        for text in texts:
            for piece in split_text(text):
                seen += len(piece)
                yield piece

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(splitting)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        # Sorted, so that the ids of the bytes do not depend on a set's order.
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces(), trainer)
    if not seen:
        raise ValueError("no text to train a tokenizer on: the corpus is empty.")
    return tokenizer


def _pre_tokenizer(splitting: Splitting) -> tokenizers.pre_tokenizers.PreTokenizer:
    if splitting == "gpt2":
        return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_BLOOM_WORD), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def fertility(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> float:
    """Tokens per word, where words are what white space divides: how finely a tokenizer cuts a language.

    In languages without spaces these "words" are whole sentences: compare two tokenizers on the same texts by the ratio of their fertilities.

    Args:
        tokenizer: A tokenizer.
        texts: Texts of one language; they are streamed.

    Raises:
        ValueError: The texts have no word.

    References:
        Le Scao et al., "BLOOM", 2022, section 3.3, where a multilingual tokenizer is compared with one of each language.

    >>> texts = ["low lower lowest"] * 4
    >>> fertility(train_tokenizer(texts, vocab_size=262), texts), fertility(train_tokenizer(texts, vocab_size=257), texts)
    (1.6666666666666667, 5.333333333333333)
    """
    tokens = words = 0
    for text in texts:
        words += len(text.split())
        for piece in split_text(text):
            tokens += len(tokenizer.encode(piece, add_special_tokens=False).ids)
    if not words:
        raise ValueError("the texts have no word to count tokens of")
    return tokens / words


def load_tokenizer(path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """Loads a ``tokenizer.json``, or the one in a folder.

    Truncation and padding that were switched on when the file was saved are switched off: they are settings of the program
    that saved it, and would cut every text.

    Args:
        path: The file, or a folder such as a downloaded model's.

    Raises:
        FileNotFoundError: There is no such file; the message says what the folder holds.
        ValueError: The file is not a tokenizer.
    """
    place = pathlib.Path(path)
    # Those of os.path, unlike pathlib's, know no name that is too long for the file system.
    file = place / "tokenizer.json" if os.path.isdir(place) else place
    if not os.path.isfile(file):
        folder = file.parent
        there = sorted(e.name for e in folder.iterdir()) if os.path.isdir(folder) else []
        hint = f"the folder holds {there[:10]}" if there else "the folder is absent or empty"
        raise FileNotFoundError(
            f"no tokenizer at {str(file)!r}: {hint}. Give a tokenizer.json or a folder with one "
            "(transformers writes it with save_pretrained on a fast tokenizer)."
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    # The library raises bare Exception for whatever it cannot read.
    except Exception as error:
        raise ValueError(
            f"{str(file)!r} is not a tokenizer.json that tokenizers {tokenizers.__version__} "
            f"can read: {error}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, path: str | os.PathLike[str]) -> pathlib.Path:
    """Writes a tokenizer, whole or not at all.

    Args:
        tokenizer: The tokenizer.
        path: A file that ends in ``.json``, or a folder, where it becomes ``tokenizer.json``.

    Returns:
        The file.
    """
    file = pathlib.Path(path)
    if file.suffix != ".json":
        file = file / "tokenizer.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    return file


def tokenizer_digest(tokenizer: tokenizers.Tokenizer) -> str:
    """A digest of all that decides how text is encoded; stores carry it."""
    return hashlib.blake2b(tokenizer.to_str().encode(), digest_size=16).hexdigest()


def separator_id(tokenizer: tokenizers.Tokenizer, token: str | None = None) -> int:
    """The id of the token that ends a document.

    Args:
        tokenizer: The tokenizer.
        token: Its name; None looks for the usual ones (``<|endoftext|>``, ``</s>``, ...).

    Raises:
        ValueError: The tokenizer has no such token.
    """
    for name in _SEPARATORS if token is None else (token,):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return found
    special = [added.content for added in tokenizer.get_added_tokens_decoder().values()]
    near = difflib.get_close_matches(token or DEFAULT_SEPARATOR, special, n=3, cutoff=0.3)
    raise ValueError(
        f"the tokenizer has no {f'token {token!r}' if token else 'usual end-of-document token'}; "
        f"name one of its special tokens: {near or special[:10]}."
    )


def split_text(text: str, limit: int = 1 << 18) -> list[str]:
    """Cuts a long text into pieces that a byte-level BPE encodes as it would the whole.

    An encoder's working memory is more than a hundred times the text that it is given at once. A cut
    before white space that follows a letter or digit is where the pre-tokenizers of GPT-2 and its
    successors cut anyway, so it changes no token. Only a text without such a place for ``limit``
    characters is cut elsewhere.

    >>> split_text("one two three", limit=5)
    ['one', ' two', ' thre', 'e']
    """
    pieces, start = [], 0
    while len(text) - start > limit:
        stop = start + limit
        for cut in range(stop, max(start, stop - 4096), -1):
            if text[cut].isspace() and text[cut - 1].isalnum():
                stop = cut
                break
        pieces.append(text[start:stop])
        start = stop
    if start < len(text):
        pieces.append(text[start:])
    return pieces
