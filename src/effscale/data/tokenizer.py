"""Train byte-level BPE tokenizers, and load and save ``tokenizer.json`` files."""

import difflib
import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import tokenizers

from effscale.atomic import atomic_file
from effscale.paths import local_path

DEFAULT_SEPARATOR = "<|endoftext|>"

Splitting = Literal["gpt2", "bloom"]
"""How a text is split into words; no token crosses a word boundary."""

BLOOM_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
"""BLOOM's special tokens, in the order of their ids."""

# A word contains no white space, parenthesis, bar, or mark that ends a clause in the scripts of BLOOM's languages.
_BLOOM_WORD = " ?[^()|\\s.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c]+"

# The names that published tokenizers use for the end-of-document token.
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
    """Train a byte-level BPE tokenizer with the algorithm of GPT-2; the same texts give the same tokenizer.

    Every string can be encoded, and decoding returns it unchanged, as all 256 bytes are tokens. For a tokenizer like
    BLOOM's, pass ``splitting="bloom", special_tokens=BLOOM_TOKENS``.

    Args:
        texts: The training texts; they are streamed, not kept in memory.
        vocab_size: The number of tokens, including special tokens and the 256 bytes. Texts with little
            variety can yield fewer.
        special_tokens: The special tokens; they get the first ids, in this order.
        splitting: ``"gpt2"`` keeps letters, digits, other characters and white space apart. ``"bloom"`` ends words only at white
            space, parentheses, the bar, and the full stops, commas and question marks of several scripts. So letters, digits and
            symbols in code can share a token, and so can spaces.

    Returns:
        A fast tokenizer, of the ``tokenizers`` library.

    Raises:
        ValueError: ``vocab_size`` is too small for the bytes and special tokens, there is no text, or ``splitting`` is unknown.

    References:
        Le Scao et al., "BLOOM" (2022), section 3.3. https://arxiv.org/abs/2211.05100

    >>> tokenizer = train_tokenizer(["low lower lowest"] * 4, vocab_size=262)
    >>> tokenizer.decode(tokenizer.encode("lower").ids)
    'lower'
    """
    for name, several in (("texts", texts), ("special_tokens", special_tokens)):
        check_several(name, several)
    smallest = 256 + len(set(special_tokens))
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size must be at least {smallest} for a byte-level BPE "
            f"(256 bytes and {len(set(special_tokens))} special tokens), got {vocab_size}"
        )
    if splitting not in get_args(Splitting):
        raise ValueError(f"splitting must be one of {get_args(Splitting)}, got {splitting!r}")
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
        # Sorted, so that the ids of the bytes do not depend on the iteration order of a set.
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces(), trainer)
    if not seen:
        raise ValueError("no text to train a tokenizer on: the corpus is empty")
    return tokenizer


def check_several(name: str, texts: Iterable[str]) -> None:
    """Raise a ValueError for one text, which Python takes for a sequence of its characters."""
    if isinstance(texts, str):
        raise ValueError(f"{name} must be several texts, got the text {texts!r:.40}. Use [text]")


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
    """Return the number of tokens per word, a measure of how finely a tokenizer splits a language.

    Words are separated by white space. In languages without spaces these "words" are whole sentences, so compare two tokenizers
    on the same texts by the ratio of their fertilities.

    Args:
        tokenizer: A tokenizer.
        texts: Texts in one language; they are streamed.

    Raises:
        ValueError: The texts have no words.

    References:
        Le Scao et al., "BLOOM" (2022), section 3.3, which compares a multilingual tokenizer with monolingual ones.
            https://arxiv.org/abs/2211.05100

    >>> texts = ["low lower lowest"] * 4
    >>> fertility(train_tokenizer(texts, vocab_size=262), texts), fertility(train_tokenizer(texts, vocab_size=257), texts)
    (1.6666666666666667, 5.333333333333333)
    """
    check_several("texts", texts)
    tokens = words = 0
    for text in texts:
        words += len(text.split())
        for piece in split_text(text):
            tokens += len(tokenizer.encode(piece, add_special_tokens=False).ids)
    if not words:
        raise ValueError("the texts have no words, so their fertility is undefined")
    return tokens / words


def read_tokenizer(path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """Load a tokenizer from a ``tokenizer.json`` or from its folder.

    Truncation and padding that were enabled when the file was saved are disabled: they are settings of the program
    that saved it and would truncate every text.

    Args:
        path: The file, or a folder such as that of a downloaded model.

    Raises:
        FileNotFoundError: The file does not exist; the message lists the content of the folder.
        ValueError: The file is not a tokenizer.
    """
    place = pathlib.Path(path)
    # Unlike pathlib, os.path raises no error for a name that is too long for the file system.
    file = place / "tokenizer.json" if os.path.isdir(place) else place
    if not os.path.isfile(file):
        folder = file.parent
        there = sorted(e.name for e in folder.iterdir()) if os.path.isdir(folder) else []
        hint = f"the folder contains {there[:10]}" if there else "the folder is absent or empty"
        raise FileNotFoundError(
            f"{file}: tokenizer not found; {hint}. Pass a tokenizer.json or a folder with one "
            "(transformers writes it when you call save_pretrained on a fast tokenizer)."
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    # The library raises a bare Exception for anything it cannot read.
    except Exception as error:
        raise ValueError(
            f"{file}: not a tokenizer.json that tokenizers {tokenizers.__version__} "
            f"can read: {error}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, path: str | os.PathLike[str]) -> pathlib.Path:
    """Save a tokenizer atomically.

    Args:
        tokenizer: The tokenizer.
        path: A file that ends in ``.json``, or a folder, in which ``tokenizer.json`` is written.

    Returns:
        The path of the file.
    """
    file = local_path(path)
    if file.suffix != ".json":
        file = file / "tokenizer.json"
    with atomic_file(file) as temporary:
        temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    return file


def tokenizer_digest(tokenizer: tokenizers.Tokenizer) -> str:
    """Return a digest of everything that affects how text is encoded; token stores record it."""
    return hashlib.blake2b(tokenizer.to_str().encode(), digest_size=16).hexdigest()


def separator_id(tokenizer: tokenizers.Tokenizer, token: str | None = None) -> int:
    """Return the id of the token that ends a document.

    Args:
        tokenizer: The tokenizer.
        token: The name of the token; None tries the usual ones (``<|endoftext|>``, ``</s>``, ...).

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
        f"the tokenizer has no {f'token {token!r}' if token else 'usual end-of-document token'}. "
        f"Pass the name of one of its special tokens: {near or special[:10]}."
    )


def split_text(text: str, limit: int = 1 << 18) -> list[str]:
    """Split a long text into pieces that a byte-level BPE encodes exactly like the whole text.

    An encoder's working memory is more than a hundred times the size of the text it gets in one call. A cut
    before white space that follows a letter or digit is a place where the pre-tokenizers of GPT-2 and its
    successors cut anyway, so it changes no token. A text is cut elsewhere only if it has no such place for
    ``limit`` characters.

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
