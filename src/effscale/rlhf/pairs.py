"""Learn from pairs of responses: the losses of a reward model and of DPO, for ``effscale.training.make_train_step``.

A batch of pairs contains ``chosen`` and ``rejected``, the tokens of prompt and response padded on the right;
``prompt_lengths``; and ``chosen_lengths`` and ``rejected_lengths``, which include the prompt. The optional
``margins`` says by how much the chosen response is better.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from effscale.models import Transformer
from effscale.options import NonNegativeFloat, checked
from effscale.rlhf.preferences import (
    diverging,
    dpo_loss,
    pairwise_accuracy,
    pairwise_loss,
    token_pairwise_loss,
)
from effscale.rlhf.scoring import at_last, head_outputs, response_log_probs
from effscale.training import Loss, add_reports
from effscale.training.objectives import head_loss


def reward_model_loss(
    model: Transformer,
    batch: Mapping[str, Array],
    key: PRNGKeyArray | None = None,
    *,
    form: Literal["response", "token"] = "response",
    center: float = 0.0,
    lm_coef: float = 0.0,
    head: str = "score",
) -> Loss:
    r"""Compute the loss of a reward model, which learns to give the better response the higher score.

    $$L = L_{pairs} + c_{lm}\, \mathrm{mean}\bigl(-\log p(y_c \mid x)\bigr)$$

    Args:
        model: A model with a head of one class: ``pool="last"`` or ``"none"`` for ``form="response"``, ``"none"`` for ``"token"``. With ``lm_coef`` it also
            has a head named ``lm``.
        batch: Pairs, see ``effscale.rlhf.pairs``.
        key: Turns on dropout.
        form: ``response`` compares the scores at the end of the responses (``effscale.rlhf.pairwise_loss``);
            ``token`` compares the scores after each token from the first difference on, as DeepSpeed-Chat does
            (``effscale.rlhf.token_pairwise_loss``).
        center: Weight of the squared sum of both scores, which keeps them around 0; for ``form="response"``.
        lm_coef: Weight of the cross entropy of the better response's tokens, averaged over each response and over
            pairs. A model that keeps predicting responses while it learns to compare them can generalize better to
            unseen pairs. The experiment ``rlhf`` uses 0.5.
        head: Name of the head.

    Returns:
        The loss; its metrics are ``accuracy``, the mean scores ``chosen_score`` and ``rejected_score``, and
        ``lm_loss`` if ``lm_coef`` is not 0.

    References:
        Yang et al., "Regularizing Hidden States Enables Learning Generalizable Reward Model for LLMs" (2024), for
            ``lm_coef``. https://arxiv.org/abs/2406.10216

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
    form = checked("form", form, Literal["response", "token"])
    lm_coef = checked("lm_coef", lm_coef, NonNegativeFloat)
    tokens, mask = _both(batch)
    encoded = model.encode(tokens, attention_mask=mask, key=key)
    outputs = head_outputs(model, encoded.hidden, mask, head, key)
    ends = at_last(outputs, mask)
    pairs = tokens.shape[0] // 2
    chosen, rejected = ends[:pairs], ends[pairs:]
    if form == "response":
        margin = batch.get("margins", 0.0)
        loss = pairwise_loss(chosen, rejected, margin=margin, center=center)
    else:
        if outputs.ndim != 3:
            raise ValueError(
                f"form='token' needs a score after each token. Use a head {head!r} with pool='none'"
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
    if lm_coef:
        if "lm" not in model.heads:
            raise ValueError(
                f"lm_coef={lm_coef} needs a head named 'lm'; the model's heads are {sorted(model.heads)}"
            )
        place = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.int32)[None]  # of the next token
        prompt, end = batch["prompt_lengths"][:, None], batch["chosen_lengths"][:, None]
        said = ((place >= prompt) & (place < end)).astype(jnp.float32)
        share = said / jnp.maximum(said.sum(1, keepdims=True), 1)
        following = jnp.roll(batch["chosen"], -1, axis=1)
        text = head_loss(model, "lm", encoded.hidden[:pairs], following, share)
        metrics["lm_loss"] = text.mean()  # each response has a weight of 1
        loss = loss + lm_coef * metrics["lm_loss"]
    weight = jnp.float32(pairs)
    sums = {name: weight * value for name, value in metrics.items()}
    return add_reports(Loss(weight * loss, weight, sums), encoded.reports)


def preference_loss(
    policy: Transformer,
    batch: Mapping[str, Array],
    key: PRNGKeyArray | None,
    reference: Transformer,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Loss:
    """Compute the DPO loss, which trains a policy without a reward model; see ``effscale.rlhf.dpo_loss``.

    Pass the reference model to the step as ``frozen``: ``step(state, batch, frozen=reference)``, or ``fit(..., frozen=reference)``.

    Args:
        policy: A causal model with a head named ``lm``.
        batch: Pairs, see ``effscale.rlhf.pairs``.
        key: Turns on dropout.
        reference: The policy before training.
        beta: Strength of the penalty for moving away from the reference.
        label_smoothing: The assumed share of pairs with swapped labels.
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
    """Stack chosen on top of rejected, with their masks."""
    tokens = jnp.concatenate([batch["chosen"], batch["rejected"]])
    lengths = jnp.concatenate([batch["chosen_lengths"], batch["rejected_lengths"]])
    return tokens, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
