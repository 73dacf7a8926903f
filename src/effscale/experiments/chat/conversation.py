"""A conversation: what was said, and a model that continues it."""

import copy
import pathlib
from collections.abc import Iterator

import jax

from effscale.experiments.chat.config import Config
from effscale.generation import AnswerText, SamplingConfig, sampling_from_folder, stream
from effscale.interop import load_pretrained
from effscale.models import Transformer, unroll
from effscale.rlhf.data import Message, PlainFormat, RecordEncoder, load_encoder

BUCKET = 64
"""Prompts are padded to multiples of this, so that few lengths are compiled."""


class Conversation:
    """What was said so far, and the model that answers.

    Args:
        model: A causal model.
        encoder: Its tokenizer and chat format.
        sampling: How it answers.
        seed: Of the drawing.
        system: What it is told before.
    """

    def __init__(
        self,
        model: Transformer,
        encoder: RecordEncoder,
        sampling: SamplingConfig,
        *,
        seed: int = 0,
        system: str = "",
    ):
        self.model, self.encoder, self.sampling = unroll(model), encoder, sampling
        self.system, self.messages = system, list[Message]()
        self._key, self._answers = jax.random.key(seed), 0
        limit = model.config.max_length
        self._room = None if limit is None else limit - sampling.max_new_tokens
        if self._room is not None and self._room < 1:
            raise ValueError(
                f"max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt: the model has {limit} positions"
            )

    @classmethod
    def open(cls, folder: pathlib.Path, config: Config) -> "Conversation":
        """Starts a conversation with the model in a folder.

        Raises:
            FileNotFoundError: The folder is not there, or holds no model or no tokenizer.
            ValueError: The model cannot converse.
        """
        encoder = load_encoder(folder, format=config.format)
        sampling = sampling_from_folder(
            folder,
            stop_ids=encoder.stop_ids,
            pad_id=encoder.padding,
            **config.sampling_changes(),
        )
        model = load_pretrained(folder, dtype=config.dtype)
        return cls(model, encoder, sampling, seed=config.seed, system=config.system)

    def fresh(self) -> "Conversation":
        """An empty conversation with the same model, whose weights both share."""
        other = copy.copy(self)
        other.messages, other._answers = [], 0
        return other

    def clear(self) -> None:
        """Forgets what was said."""
        self.messages.clear()

    def answer(self, words: str) -> Iterator[str]:
        """The model's answer to what a user says, piece by piece.

        The oldest turns are left out where the model has no room for all. An answer that is not read to its end is kept as far as it was read.

        Raises:
            ValueError: What the user says is itself too long for the model, or cannot be put in the chat format.
        """
        said = [*self.messages, Message("user", words)]
        prompt, said = self._fitting(said)
        self.messages = said
        width = -(-len(prompt) // BUCKET) * BUCKET
        width = width if self._room is None else min(width, self._room)
        padding = width - len(prompt)
        padded = [[self.encoder.padding] * padding + prompt]
        real = [[False] * padding + [True] * len(prompt)]
        key = jax.random.fold_in(self._key, self._answers)
        self._answers += 1
        form = self.encoder.format
        stops = (form.user.strip(),) if isinstance(form, PlainFormat) else ()
        text = AnswerText(self.encoder.tokenizer, prompt, stop_strings=stops)
        try:
            drawn = stream(self.model, padded, self.sampling, attention_mask=real, key=key)
            for new in drawn:
                for token in new.tokens[0, new.mask[0]].tolist():
                    if text.add(token):
                        break
                yield text.take(words=True)
                if text.ended:
                    break
            text.end()
            yield text.take()
        finally:
            self.messages.append(Message("assistant", text.text.strip()))

    def _fitting(self, said: list[Message]) -> tuple[list[int], list[Message]]:
        """The prompt's ids, and the turns that are in it: the newest ones that the model has room for."""
        before = [Message("system", self.system)] if self.system else []
        while True:
            prompt = self.encoder.prompt([*before, *said])
            if self._room is None or len(prompt) <= self._room:
                return prompt, said
            if len(said) == 1:
                raise ValueError(
                    f"that is {len(prompt)} tokens, and the model has room for {self._room} beside its answer"
                )
            said = said[2:]
