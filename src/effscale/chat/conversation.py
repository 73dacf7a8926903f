"""A conversation: the messages so far, and a model that continues it."""

import copy
import pathlib
from collections.abc import Iterator

import jax

from effscale.chat.config import Config
from effscale.generation import SamplingConfig, stream
from effscale.generation.text import AnswerText
from effscale.interop import load_encoder, load_pretrained, sampling_from_folder
from effscale.models import Transformer, unroll
from effscale.rlhf.data import Message, RecordEncoder, RecordError
from effscale.rlhf.data.chat import PlainFormat

BUCKET = 64
"""Prompts are padded to multiples of this, so that only a few lengths are compiled."""


class Conversation:
    """The messages so far, and the model that answers.

    Args:
        model: A causal model.
        encoder: Its tokenizer and chat format.
        sampling: Sampling options.
        seed: Random seed of sampling.
        system: The system message.
        max_prompt_tokens: Maximum number of tokens that the model reads before an answer.
    """

    def __init__(
        self,
        model: Transformer,
        encoder: RecordEncoder,
        sampling: SamplingConfig,
        *,
        seed: int = 0,
        system: str = "",
        max_prompt_tokens: int = Config.max_prompt_tokens,
    ):
        self.model, self.encoder, self.sampling = unroll(model), encoder, sampling
        self.system, self.messages = system, list[Message]()
        self._key, self._answers = jax.random.key(seed), 0
        limit = model.config.max_length
        self._room = max_prompt_tokens
        if limit is not None:
            self._room = min(self._room, limit - sampling.max_new_tokens)
        if self._room < 1:
            raise ValueError(
                f"max_new_tokens must be less than the model's {limit} positions, to leave room for a prompt, got {sampling.max_new_tokens}"
            )

    @classmethod
    def open(cls, folder: pathlib.Path, config: Config) -> "Conversation":
        """Start a conversation with the model in a folder.

        Raises:
            FileNotFoundError: The folder does not exist, or has no model or no tokenizer.
            ValueError: The model cannot be used for a chat.
        """
        encoder = load_encoder(folder, format=config.format)
        sampling = sampling_from_folder(
            folder,
            stop_token_ids=encoder.stop_token_ids,
            pad_token_id=encoder.padding,
            **config.sampling_changes(),
        )
        model = load_pretrained(folder, dtype=config.dtype)
        most = config.max_prompt_tokens
        options = {"seed": config.seed, "system": config.system, "max_prompt_tokens": most}
        return cls(model, encoder, sampling, **options)

    def fresh(self) -> "Conversation":
        """Return an empty conversation with the same model; both share the weights."""
        other = copy.copy(self)
        other.messages, other._answers = [], 0
        return other

    def clear(self) -> None:
        """Forget all messages."""
        self.messages.clear()

    def answer(self, words: str) -> Iterator[str]:
        """Yield the model's answer to a user's message, piece by piece.

        The oldest turns are left out if there is no room for all. If the answer is not read to its end, the part
        that was read is kept.

        Raises:
            ValueError: The user's message is too long, or does not fit the chat format.
        """
        said = [*self.messages, Message("user", words)]
        try:
            prompt, said = self._fitting(said)
        except RecordError as error:
            if error.reason != "special_token":
                raise
            raise ValueError(
                "the message contains the name of a special token of the model, such as the end of a message"
            ) from None
        self.messages = said
        width = min(-(-len(prompt) // BUCKET) * BUCKET, self._room)
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
        """Return the ids of the prompt, and the turns in it: the newest ones that there is room for."""
        before = [Message("system", self.system)] if self.system else []
        while True:
            prompt = self.encoder.prompt([*before, *said])
            if len(prompt) <= self._room:
                return prompt, said
            if len(said) == 1:
                raise ValueError(
                    f"the message has {len(prompt)} tokens, but there is room for {self._room}: max_prompt_tokens, or the model's positions without those of its answer"
                )
            said = said[2:]
