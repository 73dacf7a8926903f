"""Questions with a few answers, of which the model takes the one that it finds likeliest."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Shaped

from effscale.evaluation.continuations import score_continuations

Normalization = Literal["none", "token", "byte"]


class Ranking(NamedTuple):
    """What :func:`rank_answers` returns.

    Attributes:
        best: The number of the likeliest answer to each prompt.
        log_probs: For each prompt, those of its answers, divided as asked.
    """

    best: Shaped[np.ndarray, "prompts"]
    log_probs: list[Shaped[np.ndarray, "answers"]]


def rank_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    normalize: Normalization = "none",
    start_id: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Ranking:
    """Return the answer to each prompt whose tokens are likeliest after it: rank evaluation, as of T0 and BLOOMZ.

    Prompt and answer are encoded together, so that tokens are those of the whole text. What is scored begins with the first token that the prompt alone does not have: where
    a token holds the end of the prompt and the beginning of the answer, with that token.

    Args:
        model: As in :func:`score_continuations`.
        tokenizer: The model's, of tokenizers or transformers. It adds no special tokens here.
        prompts: Texts.
        answers: For each prompt, texts that could follow it, with the space that divides them if there is one.
        normalize: ``"none"`` compares sums of log-probabilities, as T0 and BLOOMZ do; ``"token"`` and ``"byte"`` divide them by the answer's length.
        start_id: A token before each prompt, such as the one that begins a text; needed where a prompt is empty.
        batch_size: Rows of a batch.
        max_length: Tokens that the model may read at once; a longer prompt loses its beginning.

    Raises:
        ValueError: A prompt has no answers, an answer is empty, there is no token before it, or ``normalize`` is unknown.

    References:
        Sanh et al., "Multitask Prompted Training", 2021, section 6; Muennighoff et al., "Crosslingual Generalization through Multitask Finetuning", 2022.

    Example:
        >>> from flax import nnx
        >>> from effscale.data import train_tokenizer
        >>> from effscale.models import Transformer, gpt2
        >>> tokenizer = train_tokenizer(["Is it so? yes no"] * 3, vocab_size=270)
        >>> model = Transformer(gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=270, max_length=64), rngs=nnx.Rngs(0))
        >>> rank_answers(model, tokenizer, ["Is it so?"], [[" yes", " no"]]).best.shape
        (1,)
    """
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts and answers to {len(answers)}")
    if normalize not in get_args(Normalization):
        raise ValueError(f"normalize must be one of {get_args(Normalization)}, got {normalize!r}")
    if not prompts:
        return Ranking(np.zeros(0, np.int64), [])
    begin = [] if start_id is None else [start_id]
    contexts, continuations, sizes = [], [], []
    for number, (prompt, choices) in enumerate(zip(prompts, answers, strict=True)):
        if not choices:
            raise ValueError(f"prompt {number} has no answers")
        for answer in choices:
            if not answer:
                raise ValueError(f"an answer to prompt {number} is empty")
            context, continuation = _divided(tokenizer, prompt, answer)
            if not (begin or context):
                raise ValueError(
                    f"prompt {number} has no token of its own before its answers: give start_id, the token that begins a text"
                )
            contexts.append([*begin, *context])
            continuations.append(continuation)
            sizes.append(
                {"none": 1, "token": len(continuation), "byte": len(answer.encode())}[normalize]
            )
    found = score_continuations(
        model, contexts, continuations, batch_size=batch_size, max_length=max_length
    )
    divided = found.log_probs / np.array(sizes)
    ends = np.cumsum([len(choices) for choices in answers])[:-1]
    each = np.split(divided, ends)
    return Ranking(np.array([int(scores.argmax()) for scores in each]), each)


def _divided(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the tokens of prompt and answer, divided before the first that the prompt alone does not have; one at least is the answer's."""
    alone, whole = _ids(tokenizer, prompt.rstrip()), _ids(tokenizer, prompt + answer)
    shared = 0
    while shared < min(len(alone), len(whole) - 1) and alone[shared] == whole[shared]:
        shared += 1
    return whole[:shared], whole[shared:]


def _ids(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(encoded, "ids", encoded))
