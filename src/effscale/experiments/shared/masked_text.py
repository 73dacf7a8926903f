"""What the experiment ``random_ltd_bert`` learns from: rows of text with hidden tokens, and passages to be told apart."""

import grain
import numpy as np
import tokenizers

from effscale.data import Corpus, TokenStore, batch_rows, packed_rows
from effscale.experiments.shared.classifier.cutting import cut_passages
from effscale.experiments.shared.classifier.data import Data
from effscale.experiments.shared.config_parts import PassagePart
from effscale.models.validation import check

MASK_TOKEN = "[MASK]"

# What becomes of a hidden token.
MASKED, RANDOM = 0.8, 0.1


def with_mask(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy of the tokenizer with a token that stands for hidden ones, numbered after all others."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens([MASK_TOKEN])
    return copy


class HideTokens:
    """Hides some of a row's tokens, to be told by the model.

    Of the real tokens without those that end documents, the share ``hidden`` is chosen, rounded, and at least one. Of these
    80 percent become the mask token, 10 percent any token of the vocabulary, and 10 percent stay. Which is a pure
    function of the seed and of the row's place in the stream: a row that comes again has others hidden.

    Args:
        vocab_size: Tokens without the mask; the mask's number.
        end: The token that ends a document.
        hidden: The share of the tokens that is hidden.
        seed: Another seed hides other tokens.

    Source: Devlin et al., "BERT", 2018, section 3.1; Liu et al., "RoBERTa", 2019, section 4.1, for hiding anew each time.

    Example:
        >>> row = {"input_ids": np.array([5, 6, 7, 0]), "segment_ids": np.ones(4, int), "positions": np.arange(4)}
        >>> hide = HideTokens(vocab_size=50, end=0, hidden=0.4, seed=0)
        >>> hide(3, row)["labels"].tolist()
        [-100, 6, -100, -100]
    """

    def __init__(self, *, vocab_size: int, end: int, hidden: float, seed: int):
        self.vocab_size, self.end, self.hidden, self.seed = vocab_size, end, hidden, seed

    def __call__(self, place: int, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``input_ids`` with hidden tokens, ``labels`` that are -100 elsewhere and weigh 0, segments and positions."""
        chance = np.random.default_rng([self.seed, place])
        ids = row["input_ids"]
        real = np.flatnonzero((row["segment_ids"] > 0) & (ids != self.end))
        count = min(len(real), max(1, round(self.hidden * len(real))))
        chosen = chance.choice(real, count, replace=False)
        becomes, fate = ids[chosen], chance.random(count)
        becomes = np.where(fate < MASKED, self.vocab_size, becomes)
        other = (fate >= MASKED) & (fate < MASKED + RANDOM)
        becomes = np.where(other, chance.integers(0, self.vocab_size, count), becomes)
        shown, labels = ids.astype(np.int32), np.full(ids.shape, -100, np.int32)
        shown[chosen], labels[chosen] = becomes, ids[chosen]
        return {
            "input_ids": shown,
            "labels": labels,
            "loss_weights": (labels >= 0).astype(np.float32),
            "segment_ids": row["segment_ids"],
            "positions": row["positions"],
        }


def hidden_rows(
    corpora: tuple[Corpus, ...],
    weights: tuple[float, ...] | None,
    *,
    validation: bool,
    length: int,
    batch_size: int,
    hidden: float,
    seed: int,
) -> grain.IterDataset:
    """Batches with hidden tokens: of the training texts without end, or of the held-out ones once, in order."""
    stores = [corpus.validation if validation else corpus.train for corpus in corpora]
    rows = packed_rows(
        stores,
        length=length,
        seed=seed,
        shuffle=not validation,
        weights=None if validation else weights,
        num_epochs=1 if validation else None,
    )
    corpus = corpora[0]
    hide = HideTokens(vocab_size=corpus.vocab_size, end=corpus.eos_id, hidden=hidden, seed=seed)
    return batch_rows(
        rows.map_with_index(hide), batch_size=batch_size, pad_to_batch=validation, num_threads=1
    )


def passages_data(corpora: tuple[Corpus, ...], config: PassagePart) -> Data:
    """Passages of the largest training documents; the class of one is the document that it comes from.

    Training passages come from the first three quarters of a document and test ones from the last, spread evenly and without
    overlap, equally many of each document.

    Args:
        corpora: The corpus, or the parts of a mixture.
        config: An experiment's.

    Raises:
        ValueError: If there are too few documents, or they are too short.
    """
    size, classes, recipe = config.passage, config.classes, config.finetune
    count = (recipe.train or 0) // classes * classes
    if count < recipe.batch_size:
        raise ValueError(
            f"Config.finetune.train={recipe.train}: equally many of classes={classes} are {count}, and must be at least "
            f"finetune.batch_size={recipe.batch_size}"
        )
    documents = sorted(
        (
            (int(stop - start), number, int(start), corpus.train)
            for number, corpus in enumerate(corpora)
            for start, stop in _bounds(corpus.train)
        ),
        key=lambda document: (-document[0], *document[1:3]),
    )[:classes]
    enough = f"at most the {len(documents)} documents of the corpus"
    check(config, len(documents) == classes, "classes", enough)
    tokens = [store.tokens[start : start + length] for length, _, start, store in documents]
    asked = {"train": recipe.train or 0, "test": recipe.test or 0}
    texts = cut_passages(tokens, size, asked, field="Config.finetune")
    return Data(texts["train"], texts["test"], classes)


def _bounds(store: TokenStore) -> list[tuple[int, int]]:
    """First and last but one token of each document, without the token that ends it."""
    starts = np.asarray(store.offsets[: store.num_documents])
    stops = np.append(starts[1:], store.num_tokens) - 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))
