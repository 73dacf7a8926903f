"""The data of each step of the experiment ``rlhf``."""

import ast
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from effscale.data import Splits, StandardLibrary, train_tokenizer
from effscale.experiments.rlhf.config import SMOLLM2, Config
from effscale.experiments.shared import assets
from effscale.experiments.shared.preference_data import preference_pairs
from effscale.interop import load_encoder, load_tokenizer
from effscale.interop.tokenizer import MissingTokenizerError
from effscale.rlhf.data import (
    Record,
    RecordEncoder,
    fine_tuning_rows,
    pair_rows,
    phase_split,
    prompt_rows,
    read_records,
    row_batches,
    split_by_prompt,
    standard_library_pairs,
)
from effscale.rlhf.data.standard_library import first_sentence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phases:
    """The records of each step, and the held-out records."""

    sft: Sequence[Record]
    reward: Sequence[Record]
    prompts: Sequence[Record]
    held_out: Sequence[Record]


def read_phases(config: Config) -> Phases:
    """Read all records and assign them to the steps; the same for every seed."""
    train: list[Record] = []
    held_out: list[Record] = []
    more: list[Record] = []
    for source in config.data:
        if source == "stdlib":
            pairs = standard_library_pairs(held_out=config.held_out, rejected=config.rejected)
            functions = len(pairs.train) // config.rejected
            train += pairs.train[:functions]
            more += pairs.train[functions:]
            held_out += pairs.held_out
        else:
            read = preference_pairs() if source == "preferences" else read_records(source)
            splits = Splits(fractions={"train": 1 - config.held_out, "held_out": config.held_out})
            parts = split_by_prompt(read, splits)
            train += parts["train"]
            held_out += parts["held_out"]
    parts = [train] * 3
    if config.split != "all":
        parts = [[train[i] for i in part] for part in phase_split(len(train), config.split)]
    sft, reward, prompts = parts
    seen = {record.prompt for record in reward}
    reward = [*reward, *(record for record in more if record.prompt in seen)]
    return Phases(sft=sft, reward=reward, prompts=prompts, held_out=held_out)


def actor_source(config: Config) -> pathlib.Path | None:
    """Return the path of the model that the run starts from; None if it creates one."""
    if config.actor == SMOLLM2 and not SMOLLM2.exists():
        return assets.smollm2_file()
    return config.actor


def make_encoder(config: Config, phases: Phases) -> RecordEncoder:
    """Return the actor's tokenizer and chat format; without an actor's folder, a tokenizer trained on the records that are not held out."""
    actor = actor_source(config)
    if actor is not None:
        return load_encoder(actor)
    texts = [
        text
        for record in (*phases.sft, *phases.reward, *phases.prompts)
        for text in (record.as_text(), record.chosen)
        if text
    ]
    return RecordEncoder(
        tokenizer=train_tokenizer(sorted(set(texts)), vocab_size=config.vocab_size)
    )


def check_reward_tokenizer(reward: pathlib.Path, encoder: RecordEncoder) -> None:
    """Raise a ValueError if a reward model, which reads the actor's tokens, has a tokenizer that gives tokens other ids.

    A folder without a tokenizer has nothing to compare.
    """
    try:
        its = load_tokenizer(reward).get_vocab()
    except MissingTokenizerError:
        return
    ours = encoder.tokenizer.get_vocab()
    if other := sorted(set(ours.items()) ^ set(its.items())):
        raise ValueError(
            f"reward must be a model with the actor's tokenizer, because it reads the actor's tokens, got {str(reward)!r}, whose {len(its)} tokens differ "
            f"from the actor's {len(ours)} in {other[0][0]!r}. To score with another tokenizer, use effscale.rlhf.from_text in your own loop"
        )


class Rows:
    """Endless batches, with a position that a checkpoint can store.

    Args:
        rows: Arrays by name.
        batch_size: Rows per batch.
        seed: Seed of the order.
    """

    def __init__(self, rows: Mapping[str, np.ndarray], batch_size: int, seed: int):
        self._rows, self._batch_size, self._seed = dict(rows), batch_size, seed
        self._per_epoch = len(next(iter(self._rows.values()))) // batch_size
        if not self._per_epoch:
            count = len(next(iter(self._rows.values())))
            raise ValueError(
                f"batch_size must be at most the number of rows, {count}, got {batch_size}. Use more records or a smaller batch_size"
            )
        self.set_state(0)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._position % self._per_epoch == 0:
            self._epoch = self._batches(self._position // self._per_epoch)
        self._position += 1
        return next(self._epoch)

    def get_state(self) -> int:
        """Return the number of batches so far."""
        return self._position

    def set_state(self, state: int) -> None:
        """Continue after ``state`` batches."""
        self._position = state
        epoch, index = divmod(state, self._per_epoch)
        self._epoch = self._batches(epoch)
        for _ in range(index):
            next(self._epoch)

    def _batches(self, epoch: int) -> Iterator[dict[str, np.ndarray]]:
        return row_batches(self._rows, self._batch_size, epoch=epoch, seed=self._seed)


class PromptsAndText(Rows):
    """Endless batches of prompts, each with rows of ordinary text in its field ``text``.

    Args:
        prompts: The prompts.
        batch_size: Prompts per batch.
        seed: Seed of both orders.
        text: The rows of text.
        text_rows: Rows of text per batch.
    """

    def __init__(
        self,
        prompts: Mapping[str, np.ndarray],
        batch_size: int,
        seed: int,
        *,
        text: Mapping[str, np.ndarray],
        text_rows: int,
    ):
        self._text = Rows(text, text_rows, seed)
        super().__init__(prompts, batch_size, seed)

    def __next__(self) -> dict[str, Any]:
        return {**super().__next__(), "text": next(self._text)}

    def set_state(self, state: int) -> None:
        """Continue after ``state`` batches."""
        super().set_state(state)
        self._text.set_state(state)


def text_rows(
    config: Config,
    tokenizer: tokenizers.Tokenizer,
    held_out: Sequence[Record],
    end_id: int,
    rows: int,
) -> dict[str, np.ndarray]:
    """Return rows of the library's source without the documentation of held-out functions, at most ``rows``, each different."""
    hidden = {record.chosen for record in held_out}
    length = config.length
    wanted = rows * length + 1
    texts = [
        document.text
        for document in StandardLibrary().documents(log=False)
        if document.source.startswith("stdlib/")
    ]
    ids: list[int] = []
    for place in np.random.default_rng(0).permutation(len(texts)):
        ids += [
            *tokenizer.encode(without(texts[place], hidden), add_special_tokens=False).ids,
            end_id,
        ]
        if len(ids) >= wanted:
            break
    rows = min(rows, (len(ids) - 1) // length)
    flat = np.array(ids[: rows * length + 1], np.int32)
    shaped = lambda part: part.reshape(rows, length)
    return {"input_ids": shaped(flat[:-1]), "labels": shaped(flat[1:])}


def without(source: str, hidden: set[str | None]) -> str:
    """Return a module's source without the docstrings that begin with one of these sentences."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source
    lines = source.splitlines(keepends=True)
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in ast.walk(tree):
        if isinstance(node, kinds) and first_sentence(ast.get_docstring(node) or "") in hidden:
            docstring = node.body[0]
            for number in range(docstring.lineno - 1, docstring.end_lineno or docstring.lineno):
                lines[number] = ""
    return "".join(lines)


def sft_rows(
    config: Config, encoder: RecordEncoder, records: Sequence[Record]
) -> dict[str, np.ndarray]:
    """Return packed rows of prompts and chosen responses; longer ones are left out."""
    return fine_tuning_rows(records, encoder, length=config.length)


def pairs_of(
    config: Config, encoder: RecordEncoder, records: Sequence[Record]
) -> dict[str, np.ndarray]:
    """Return pairs of one length."""
    lengths = (config.total_length,)
    return pair_rows(records, encoder, lengths=lengths, too_long="cut")[config.total_length]


def prompts_of(
    config: Config, encoder: RecordEncoder, records: Sequence[Record]
) -> dict[str, np.ndarray]:
    """Return prompts of one length."""
    lengths = (config.prompt_length,)
    return prompt_rows(records, encoder, lengths=lengths)[config.prompt_length]
