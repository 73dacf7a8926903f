"""The harness's three questions, answered by a model of this library."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from effscale.evaluation.continuations import score_continuations
from effscale.evaluation.harness.answers import continue_texts
from effscale.evaluation.harness.checks import check_model, length_of
from effscale.evaluation.harness.codec import codec_of
from effscale.evaluation.harness.sampling import sampling_of
from effscale.evaluation.texts import text_log_probs
from effscale.interop import load_pretrained
from effscale.models import Transformer, unroll

try:
    from lm_eval.api.model import TemplateLM
except ImportError:  # told when a model is made, so that the package can be looked at without
    TemplateLM = object


class HarnessModel(TemplateLM):  # pyrefly: ignore[invalid-inheritance]
    """A model for ``lm_eval.simple_evaluate``. It computes what the harness's own ``hf`` model computes from the same weights.

    As there, context and continuation are encoded together and divided after the context's tokens; a context that is too long loses its beginning; texts are read in windows, and each token
    is predicted once; a task's stop strings end an answer and are cut off. Further options of :class:`effscale.generation.SamplingConfig` may stand in a task's ``generation_kwargs``.

    Args:
        model: A causal :class:`effscale.models.Transformer`, packed or not; the path of a model folder or GGUF file; or, for tasks that generate nothing, any other model that
            :func:`effscale.evaluation.score_continuations` takes. Experts must have no capacity.
        tokenizer: The model's, of tokenizers or transformers, or the path of a folder that has it. None: that of ``model``, which is a path then.
        batch_size: Rows of a batch.
        max_length: Tokens that the model reads at once. None: what the folder says; else the model's positions; else what the tokenizer says; else 2048.
        start_id: What stands before a text that has nothing before it. None: what begins a text, or else what ends one, by the folder or tokenizer.
        stop_ids: Tokens that end an answer, besides the one that ends a text and those of the folder's ``generation_config.json``.
        add_special_tokens: Whether the tokenizer adds to a text what it begins and ends texts with.
        dtype: As for :func:`effscale.interop.load_pretrained`, where ``model`` is a path.
        seed: For tasks that sample.

    Raises:
        ImportError: lm_eval is not installed.
        ValueError: There is no tokenizer; the model predicts no next token, or its experts have a capacity; ``max_length`` is more than its positions.
        FolderError: A path is no model folder; a ``ValueError``.

    References:
        Gao et al., "The Language Model Evaluation Harness", 2024.

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
        start_id: int | None = None,
        stop_ids: Iterable[int] = (),
        add_special_tokens: bool = True,
        dtype: Any = None,
        seed: int = 0,
    ):
        if TemplateLM is object:
            raise ImportError(
                "evaluation with the harness needs lm_eval: install it with pip install lm_eval"
            )
        super().__init__()
        # The harness would fork processes for the spread of BLEU and the like, which may hang beside JAX's threads.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        if tokenizer is None and not _is_path(model):
            raise ValueError("a model needs its tokenizer: give it, or the path of its folder")
        if dtype is not None and not _is_path(model):
            raise ValueError(f"dtype={dtype!r} is for a model that is loaded from a path")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        # Where generation_config.json is looked for.
        self.folder = next((given for given in (model, tokenizer) if _is_path(given)), None)
        codec = codec_of(model if tokenizer is None else tokenizer)
        self.codec = dataclasses.replace(
            codec,
            start_id=codec.start_id if start_id is None else start_id,
            add_special_tokens=add_special_tokens,
        )
        self.tokenizer = codec.tokenizer
        self.model = load_pretrained(model, dtype=dtype) if _is_path(model) else model
        check_model(self.model)
        self.batch_size, self.seed, self.stop_ids = batch_size, seed, tuple(stop_ids)
        self.max_length = length_of(self.model, self.codec, max_length)

    @property
    def eot_token_id(self) -> int | None:
        """What ends a text."""
        return self.codec.end_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it.

        Raises:
            ValueError: There is no such token.
        """
        if self.codec.start_id is None:
            raise ValueError(
                "a text with nothing before it needs a token that begins texts, and the tokenizer tells none: give start_id"
            )
        return self.codec.start_id

    @property
    def tokenizer_name(self) -> str:
        """Tells requests that the harness keeps of one tokenizer from those of another."""
        name = getattr(self.tokenizer, "name_or_path", None) or self.folder
        return str(name or "tokenizer").replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text."""
        return self.codec.encode(string, add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat, by the template of a tokenizer of transformers.

        Raises:
            ValueError: The tokenizer is none of transformers.
        """
        if not hasattr(self.tokenizer, "apply_chat_template"):
            raise ValueError(
                "chat templates need a tokenizer of transformers: give AutoTokenizer.from_pretrained(folder)"
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
        """Log-probabilities of continuations, and whether each is what greedy decoding would say.

        Raises:
            ValueError: A continuation has no token of its own, or more than fit; a context is empty and there is no token that begins texts.
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
                    f"{continuation!r:.80} has no token of its own after {context!r:.80}: "
                    "the tokenizer merges the two, or it is the token that begins texts"
                )
            if len(after) > self.max_length:
                raise ValueError(
                    f"{continuation!r:.80} after {context!r:.80} has {len(after)} tokens, more than max_length={self.max_length}"
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
        """Log-probabilities of whole texts; that of an empty one is 0.

        Raises:
            ValueError: There is no token that begins texts.
        """
        texts = [self.tok_encode(request.args[0]) for request in requests]
        found = dict.fromkeys(range(len(texts)), 0.0)
        for places in self._batches(list(map(len, texts)), "texts", disable_tqdm):
            real = [i for i in places if texts[i]]
            nats = text_log_probs(
                self.model,
                [texts[i] for i in real],
                start_id=self.prefix_token_id,
                max_length=self.max_length,
                batch_size=self.batch_size,
            )
            found |= zip(real, nats.tolist(), strict=True)
            for i in places:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, found[i])
        return [found[i] for i in range(len(texts))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to contexts, up to the first stop string.

        Raises:
            ValueError: ``generation_kwargs`` has an unknown name or an impossible value, or leaves no room for a context.
        """
        if not isinstance(self.model, Transformer):
            raise ValueError(
                f"a {type(self.model).__name__} generates nothing here: only an effscale Transformer does"
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
                stop_ids=self.stop_ids,
            )
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={sampling.max_new_tokens}: must be below max_length={self.max_length}, so that a context fits"
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
        """Places of rows of like length, the longest first, with a bar of how many are done."""
        from tqdm import tqdm

        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        with tqdm(total=len(order), desc=what, disable=disable_tqdm) as bar:
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                yield places
                bar.update(len(places))


def _is_path(given: Any) -> bool:
    return isinstance(given, str | os.PathLike)
