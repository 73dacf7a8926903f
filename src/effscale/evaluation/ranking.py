"""Rank the answers to a question by their likelihood under the model."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Shaped

from effscale.data.tokenizer import check_several
from effscale.evaluation.continuations import score_continuations

Normalization = Literal["none", "token", "byte"]


class RankedAnswers(NamedTuple):
    """The result of ``rank_answers``.

    Attributes:
        best: The index of the most likely answer to each prompt.
        log_probs: The log-probabilities of the answers to each prompt, normalized as requested.
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
    bos_token_id: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> RankedAnswers:
    """Find the most likely answer to each prompt: rank evaluation, as for T0 and BLOOMZ.

    Prompt and answer are encoded together, so that the tokens are those of the whole text. The score starts with the
    first token that the prompt without the answer does not have. If a token contains the end of the prompt and the
    beginning of the answer, the score starts with that token.

    Args:
        model: As in ``score_continuations``.
        tokenizer: The tokenizer of the model, of tokenizers or transformers. It adds no special tokens here.
        prompts: The prompts.
        answers: The possible answers to each prompt, including the space after the prompt if there is one.
        normalize: ``"none"`` compares sums of log-probabilities, as T0 and BLOOMZ do; ``"token"`` and ``"byte"`` divide
            them by the length of the answer.
        bos_token_id: A token before each prompt, such as the one that begins a text; required if a prompt is empty.
        batch_size: The number of rows in a batch.
        max_length: The maximum number of tokens that the model reads; a longer prompt loses its beginning.

    Raises:
        ValueError: A prompt has no answers, an answer is empty, no token precedes it, or ``normalize`` is unknown.

    References:
        Sanh et al., "Multitask Prompted Training Enables Zero-Shot Task Generalization" (2021), section 6.
            https://arxiv.org/abs/2110.08207
        Muennighoff et al., "Crosslingual Generalization through Multitask Finetuning" (2022). https://arxiv.org/abs/2211.01786

    Example:
        >>> from flax import nnx
        >>> from effscale.data import train_tokenizer
        >>> from effscale.models import Transformer, gpt2
        >>> tokenizer = train_tokenizer(["Is it so? yes no"] * 3, vocab_size=270)
        >>> model = Transformer(gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=270, max_length=64), rngs=nnx.Rngs(0))
        >>> rank_answers(model, tokenizer, ["Is it so?"], [[" yes", " no"]]).best.shape
        (1,)
    """
    for name, texts in (
        ("prompts", prompts),
        *((f"answers[{i}]", a) for i, a in enumerate(answers)),
    ):
        check_several(name, texts)
    if len(prompts) != len(answers):
        raise ValueError(
            f"answers must have one entry for each of the {len(prompts)} prompts, got {len(answers)}"
        )
    if normalize not in get_args(Normalization):
        raise ValueError(f"normalize must be one of {get_args(Normalization)}, got {normalize!r}")
    if not prompts:
        return RankedAnswers(np.zeros(0, np.int64), [])
    begin = [] if bos_token_id is None else [bos_token_id]
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
                    f"prompt {number} has no token before its answers. Pass bos_token_id, the token that begins a text."
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
    return RankedAnswers(np.array([int(scores.argmax()) for scores in each]), each)


def _divided(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the tokens of prompt and answer, of which the answer gets at least one.

    They are split before the first token that the prompt without the answer does not have.
    """
    alone, whole = _ids(tokenizer, prompt.rstrip()), _ids(tokenizer, prompt + answer)
    shared = 0
    while shared < min(len(alone), len(whole) - 1) and alone[shared] == whole[shared]:
        shared += 1
    return whole[:shared], whole[shared:]


def _ids(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(encoded, "ids", encoded))
