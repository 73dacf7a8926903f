"""The three request types of the harness, for models of this library."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from effscale.evaluation.continuations import score_continuations
from effscale.evaluation.texts import text_log_probs
from effscale.interop import load_pretrained
from effscale.interop.harness.codec import codec_of
from effscale.interop.harness.requests import (
    check_model,
    continue_texts,
    length_of,
    sampling_of,
)
from effscale.models import Transformer, unroll

try:
    from lm_eval.api.model import TemplateLM
except (
    ImportError
):  # reported when a model is created, so that the module can be imported without it
    TemplateLM = object


class HarnessModel(TemplateLM):  # pyrefly: ignore[invalid-inheritance]
    """A model for ``lm_eval.simple_evaluate``. Its results match those of the harness's ``hf`` model with the same weights.

    As in ``hf``, context and continuation are encoded together and split after the tokens of the context; a context that
    is too long loses its beginning; texts are read in windows, and each token is predicted once; the stop strings of a
    task end an answer and are removed. The ``generation_kwargs`` of a task may also contain other options of
    ``effscale.generation.SamplingConfig``.

    Args:
        model: A causal ``effscale.models.Transformer``, packed or not; the path of a model folder or GGUF file; or, for
            tasks that generate nothing, any other model that ``effscale.evaluation.score_continuations`` accepts. Experts
            must have no capacity.
        tokenizer: The tokenizer of the model, of tokenizers or transformers, or the path of a folder that contains it.
            None uses that of ``model``, which must then be a path.
        batch_size: The number of rows in a batch.
        max_length: The maximum number of tokens that the model reads. None uses, in this order, the value of the folder,
            the positions of the model, the value of the tokenizer, or 2048.
        bos_token_id: The token before a text without context. None uses the token that begins a text, or else the one that
            ends it, as defined by the folder or tokenizer.
        stop_token_ids: Tokens that end an answer, in addition to the one that ends a text and those of the folder's
            ``generation_config.json``.
        add_special_tokens: Whether the tokenizer adds the tokens with which it begins and ends texts.
        dtype: As in ``effscale.interop.load_pretrained``, if ``model`` is a path.
        seed: The seed for tasks that sample.

    Raises:
        ImportError: lm_eval is not installed.
        ValueError: The tokenizer is missing; the model does not predict the next token, or its experts have a capacity;
            or ``max_length`` is above its number of positions.
        FolderError: A path is not a model folder; a ``ValueError``.

    References:
        Gao et al., "The Language Model Evaluation Harness" (2024). https://zenodo.org/records/12608602

    Example:
        >>> from flax import nnx
        >>> from lm_eval.api.instance import Instance
        >>> from effscale.data import train_tokenizer
        >>> from effscale.models import gpt2
        >>> tokenizer = train_tokenizer(["Is it so? yes no"] * 3, vocab_size=270)
        >>> model = Transformer(gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=270, max_length=64), rngs=nnx.Rngs(0))
        >>> request = Instance("loglikelihood", doc={}, arguments=("Is it so?", " yes"), idx=0)
        >>> [(log_prob, greedy)] = HarnessModel(model, tokenizer).loglikelihood([request], disable_tqdm=True)
        >>> log_prob < 0
        True
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        bos_token_id: int | None = None,
        stop_token_ids: Iterable[int] = (),
        add_special_tokens: bool = True,
        dtype: Any = None,
        seed: int = 0,
    ):
        if TemplateLM is object:
            raise ImportError(
                "evaluation with the harness needs lm_eval: install it with pip install lm_eval"
            )
        super().__init__()
        # The harness would fork processes for the spread of BLEU and similar metrics, which can hang with JAX's threads.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        if tokenizer is None and not _is_path(model):
            raise ValueError(
                "tokenizer must be given if model is not a path. Pass a tokenizer, or the path of its folder."
            )
        if dtype is not None and not _is_path(model):
            raise ValueError(f"dtype must be None if model is not a path, got {dtype!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        # The folder in which to look for generation_config.json.
        self.folder = next((given for given in (model, tokenizer) if _is_path(given)), None)
        codec = codec_of(model if tokenizer is None else tokenizer)
        self.codec = dataclasses.replace(
            codec,
            bos_token_id=codec.bos_token_id if bos_token_id is None else bos_token_id,
            add_special_tokens=add_special_tokens,
        )
        self.tokenizer = codec.tokenizer
        self.model = load_pretrained(model, dtype=dtype) if _is_path(model) else model
        check_model(self.model)
        self.batch_size, self.seed, self.stop_token_ids = batch_size, seed, tuple(stop_token_ids)
        self.max_length = length_of(self.model, self.codec, max_length)

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.codec.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context.

        Raises:
            ValueError: No such token is known.
        """
        if self.codec.bos_token_id is None:
            raise ValueError(
                "a text without context needs a start token, and the tokenizer does not define one. Pass bos_token_id."
            )
        return self.codec.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """The name by which the harness distinguishes cached requests of different tokenizers."""
        name = getattr(self.tokenizer, "name_or_path", None) or self.folder
        return str(name or "tokenizer").replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the token ids of a text."""
        return self.codec.encode(string, add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a chat, formatted with the template of a transformers tokenizer.

        Raises:
            ValueError: The tokenizer is not one of transformers.
        """
        if not hasattr(self.tokenizer, "apply_chat_template"):
            raise ValueError(
                "chat templates need a tokenizer of transformers. Pass AutoTokenizer.from_pretrained(folder)."
            )
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log-probabilities of continuations, and whether greedy decoding would produce each.

        Raises:
            ValueError: A continuation adds no token to its context, or has too many; or a context is empty and no start token is known.
        """
        for request in requests:
            if not request.args[1]:
                raise ValueError(f"the continuation of {request.args[0]!r:.80} is empty")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        for (context, continuation), _, after in requests:
            if not after:
                raise ValueError(
                    f"{continuation!r:.80} adds no token to {context!r:.80}: the tokenizer merges the two, or the "
                    "continuation is the token that begins texts"
                )
            if len(after) > self.max_length:
                raise ValueError(
                    f"{continuation!r:.80} after {context!r:.80} must have at most max_length={self.max_length} tokens, got {len(after)}"
                )
        found: dict[int, tuple[float, bool]] = {}
        lengths = [len(before) + len(after) for _, before, after in requests]
        for places in self._batches(lengths, "log-probabilities", disable_tqdm):
            scores = score_continuations(
                self.model,
                [requests[i][1] for i in places],
                [requests[i][2] for i in places],
                batch_size=self.batch_size,
                max_length=self.max_length,
            )
            each = zip(places, scores.log_probs.tolist(), scores.greedy.tolist(), strict=True)
            for place, log_prob, greedy in each:
                found[place] = log_prob, greedy
                self.cache_hook.add_partial("loglikelihood", requests[place][0], found[place])
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probabilities of whole texts; that of an empty text is 0.

        Raises:
            ValueError: No start token is known.
        """
        texts = [self.tok_encode(request.args[0]) for request in requests]
        found = dict.fromkeys(range(len(texts)), 0.0)
        for places in self._batches(list(map(len, texts)), "texts", disable_tqdm):
            real = [i for i in places if texts[i]]
            nats = text_log_probs(
                self.model,
                [texts[i] for i in real],
                bos_token_id=self.prefix_token_id,
                max_length=self.max_length,
                batch_size=self.batch_size,
            )
            found |= zip(real, nats.tolist(), strict=True)
            for i in places:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, found[i])
        return [found[i] for i in range(len(texts))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate answers to contexts, up to the first stop string.

        Raises:
            ValueError: ``generation_kwargs`` has an unknown name or an invalid value, or leaves no room for a context.
        """
        if not isinstance(self.model, Transformer):
            raise ValueError(
                f"generation needs an effscale Transformer, got a {type(self.model).__name__}"
            )
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        model, drawn = unroll(self.model), 0
        for members in groups.values():
            sampling, until = sampling_of(
                requests[members[0]].args[1],
                self.codec,
                folder=self.folder,
                stop_token_ids=self.stop_token_ids,
            )
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks must be below max_length={self.max_length}, so that a context fits, got {sampling.max_new_tokens}"
                )
            contexts = [self._context(requests[i].args[0])[-room:] for i in members]
            for batch in self._batches(list(map(len, contexts)), "answers", disable_tqdm):
                key = jax.random.fold_in(jax.random.key(self.seed), drawn)
                drawn += 1
                texts = continue_texts(
                    model,
                    self.codec,
                    [contexts[i] for i in batch],
                    sampling,
                    until=until,
                    key=key,
                    rows=self.batch_size,
                    room=room,
                )
                for i, text in zip(batch, texts, strict=True):
                    place = members[i]
                    found[place] = text
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return [found[i] for i in range(len(requests))]

    def _context(self, text: str) -> list[int]:
        return self.tok_encode(text) or [self.prefix_token_id]

    def _batches(
        self, lengths: Sequence[int], what: str, disable_tqdm: bool
    ) -> Iterator[list[int]]:
        """Yield the indices of rows with similar length, the longest first, with a progress bar."""
        from tqdm import tqdm

        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        with tqdm(total=len(order), desc=what, disable=disable_tqdm) as bar:
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                yield places
                bar.update(len(places))


def _is_path(given: Any) -> bool:
    return isinstance(given, str | os.PathLike)
