"""Learning from pairs of responses: the losses of a reward model and of DPO over a batch, for :func:`effscale.training.make_train_step`.

A batch of pairs holds ``chosen`` and ``rejected``, the tokens of prompt and response padded on the right, ``prompt_lengths``, and ``chosen_lengths`` and
``rejected_lengths``, which count the prompt, too. Where present, ``margins`` says by how much the first is better.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from effscale.models import Transformer
from effscale.rlhf.preferences import (
    diverging,
    dpo_loss,
    pairwise_accuracy,
    pairwise_loss,
    token_pairwise_loss,
)
from effscale.rlhf.scoring import at_last, head_outputs, response_log_probs
from effscale.training import Loss, add_reports


def reward_model_loss(
    model: Transformer,
    batch: Mapping[str, Array],
    key: PRNGKeyArray | None = None,
    *,
    form: Literal["response", "token"] = "response",
    center: float = 0.0,
    head: str = "score",
) -> Loss:
    """What a reward model learns by: the better response shall have the higher score.

    Args:
        model: A model with a head of one class: ``pool="last"`` or ``"none"`` for ``form="response"``, ``"none"`` for ``"token"``.
        batch: Pairs, see :mod:`effscale.rlhf.pairs`.
        key: Turns dropout on.
        form: ``response`` compares the scores at the ends (:func:`effscale.rlhf.pairwise_loss`); ``token`` those after each token from the first in which
            the two differ, as DeepSpeed-Chat does (:func:`effscale.rlhf.token_pairwise_loss`).
        center: Weight of the squared sum of both scores, which keeps them around 0; for ``response``.
        head: Name of the head.

    Returns:
        The loss; its metrics are ``accuracy`` and the mean scores ``chosen_score`` and ``rejected_score``.

    Example:
        >>> import dataclasses
        >>> from flax import nnx
        >>> from effscale.models import ClassHead, gpt2
        >>> tiny = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> config = dataclasses.replace(tiny, heads=(ClassHead(num_classes=1, name="score", pool="none"),))
        >>> pairs = {"chosen": jnp.array([[5, 6, 7, 1]]), "rejected": jnp.array([[5, 6, 1, 0]]), "prompt_lengths": jnp.array([2])}
        >>> pairs |= {"chosen_lengths": jnp.array([4]), "rejected_lengths": jnp.array([3])}
        >>> sorted(reward_model_loss(Transformer(config, rngs=nnx.Rngs(0)), pairs).metrics)
        ['accuracy', 'chosen_score', 'rejected_score']
    """
    tokens, mask = _both(batch)
    outputs = head_outputs(model, tokens, mask, head, key)
    ends = at_last(outputs, mask)
    pairs = tokens.shape[0] // 2
    chosen, rejected = ends[:pairs], ends[pairs:]
    if form == "response":
        margin = batch.get("margins", 0.0)
        loss = pairwise_loss(chosen, rejected, margin=margin, center=center)
    else:
        if outputs.ndim != 3:
            raise ValueError(
                f"form='token' needs a score after each token: a head {head!r} with pool='none'"
            )
        each = outputs[..., 0].astype(jnp.float32)
        lengths = batch["chosen_lengths"], batch["rejected_lengths"]
        where = diverging(batch["chosen"], batch["rejected"], *lengths)
        loss = token_pairwise_loss(each[:pairs], each[pairs:], where)
    metrics = {
        "accuracy": pairwise_accuracy(chosen, rejected),
        "chosen_score": chosen.mean(),
        "rejected_score": rejected.mean(),
    }
    weight = jnp.float32(pairs)
    return Loss(weight * loss, weight, {name: weight * value for name, value in metrics.items()})


def preference_loss(
    policy: Transformer,
    batch: Mapping[str, Array],
    key: PRNGKeyArray | None,
    reference: Transformer,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Loss:
    """What a policy learns by without a reward model: DPO, see :func:`effscale.rlhf.dpo_loss`.

    Give the reference to the step as ``frozen``: ``step(state, batch, frozen=reference)``, or ``fit(..., frozen=reference)``.

    Args:
        policy: A causal model with a head named ``lm``.
        batch: Pairs, see :mod:`effscale.rlhf.pairs`.
        key: Turns dropout on.
        reference: The policy before training.
        beta: How dear it is to leave the reference.
        label_smoothing: The share of pairs that are supposed to be labelled the wrong way round.
    """
    tokens, mask = _both(batch)
    place = jnp.arange(1, tokens.shape[1], dtype=jnp.int32)[None]
    prompts = jnp.concatenate([batch["prompt_lengths"]] * 2)[:, None]
    counted = mask[:, 1:] & (place >= prompts)

    def said(model: Transformer, key: PRNGKeyArray | None) -> tuple[Array, object]:
        found = response_log_probs(model, tokens, mask, tokens.shape[1] - 1, key=key)
        return jnp.where(counted, found.log_probs, 0.0).sum(1), found.reports

    ours, reports = said(policy, key)
    theirs = jax.lax.stop_gradient(said(reference, None)[0])
    pairs = tokens.shape[0] // 2
    loss, metrics = dpo_loss(
        *(ours[:pairs], ours[pairs:], theirs[:pairs], theirs[pairs:]),
        beta=beta,
        label_smoothing=label_smoothing,
    )
    weight = jnp.float32(pairs)
    sums = {name: weight * value for name, value in metrics.items()}
    return add_reports(Loss(weight * loss, weight, sums), reports)


def _both(
    batch: Mapping[str, Array],
) -> tuple[Int[Array, "rows length"], Bool[Array, "rows length"]]:
    """Chosen above rejected, and their masks."""
    tokens = jnp.concatenate([batch["chosen"], batch["rejected"]])
    lengths = jnp.concatenate([batch["chosen_lengths"], batch["rejected_lengths"]])
    return tokens, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
