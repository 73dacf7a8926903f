"""Data of the experiments ``random_ltd_bert`` and ``onebit``: rows of text with masked tokens, and passages to classify."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
import tokenizers

from effscale.data import TokenStore, batch_rows, packed_rows
from effscale.data.corpus import Corpus
from effscale.experiments.shared.classifier.cutting import cut_passages
from effscale.experiments.shared.classifier.data import Data
from effscale.options import check

MASK_TOKEN = "[MASK]"

# Probabilities of what replaces a chosen token.
MASKED, RANDOM = 0.8, 0.1


def with_mask(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a copy of the tokenizer with a mask token, whose id follows all others."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens([MASK_TOKEN])
    return copy


class HideTokens:
    """Masks some of a row's tokens for the model to predict.

    Of the real tokens, except those that end documents, the fraction ``hidden`` is chosen, rounded, and at least one.
    Of these, 80 percent become the mask token, 10 percent a random token of the vocabulary, and 10 percent are
    unchanged. The choice is a pure function of the seed and of the row's position in the stream, so a repeated row
    has other tokens masked.

    Args:
        vocab_size: Number of tokens without the mask token; the id of the mask token.
        end: The token that ends a document.
        hidden: The fraction of the tokens to predict.
        seed: Seed of the choice.

    References:
        Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (2018),
            section 3.1. https://arxiv.org/abs/1810.04805
        Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach" (2019), section 4.1, for masking again
            each time. https://arxiv.org/abs/1907.11692

    Example:
        >>> row = {"input_ids": np.array([5, 6, 7, 0]), "segment_ids": np.ones(4, int), "positions": np.arange(4)}
        >>> hide = HideTokens(vocab_size=50, end=0, hidden=0.4, seed=0)
        >>> hide(3, row)["labels"].tolist()
        [-100, 6, -100, -100]
    """

    def __init__(self, *, vocab_size: int, end: int, hidden: float, seed: int):
        self.vocab_size, self.end, self.hidden, self.seed = vocab_size, end, hidden, seed

    def __call__(self, place: int, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return ``input_ids`` with masked tokens, ``labels``, which are -100 with weight 0 elsewhere, segments and positions."""
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
    weights: Sequence[float] | None,
    *,
    validation: bool,
    length: int,
    batch_size: int,
    hidden: float,
    seed: int,
) -> grain.IterDataset:
    """Return batches with masked tokens: of the training texts endlessly, or of the held-out ones once, in order."""
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
    hide = HideTokens(
        vocab_size=corpus.vocab_size, end=corpus.eos_token_id, hidden=hidden, seed=seed
    )
    return batch_rows(
        rows.map_with_index(hide), batch_size=batch_size, pad_to_batch=validation, num_threads=1
    )


def passages_data(corpora: tuple[Corpus, ...], config: Any) -> Data:
    """Return passages of the largest training documents; the class of a passage is its document.

    Training passages come from the first three quarters of a document and test passages from the last, spread evenly
    and without overlap, the same number from each document.

    Args:
        corpora: The corpus, or the parts of a mixture.
        config: Has ``passage``, ``classes`` and ``finetune``.

    Raises:
        ValueError: There are too few documents, or they are too short.
    """
    size, classes, recipe = config.passage, config.classes, config.finetune
    count = (recipe.train or 0) // classes * classes
    if count < recipe.batch_size:
        raise ValueError(
            f"Config.finetune.train={recipe.train}: must give at least finetune.batch_size={recipe.batch_size} passages when split "
            f"equally over classes={classes}, but gives {count}"
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
    """Return the bounds of each document, without the token that ends it."""
    starts = np.asarray(store.offsets[: store.num_documents])
    stops = np.append(starts[1:], store.num_tokens) - 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))
