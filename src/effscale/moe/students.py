r"""Mixture of Students: distill a deep mixture of experts into a shallower one, which then continues without the teacher.

$$L = L_{LM} + \alpha\, \tau^2\, \mathrm{KL}(p^T \| p^S) + \sum_l a_l$$

with the divergence averaged over tokens. DeepSpeed-MoE finds that learning from the teacher until the end hurts: the
student's own loss stops decreasing. So the teacher is removed earlier (in the paper after 400,000 of about 570,000
steps).

References:
    Rajbhandari et al., "DeepSpeed-MoE" (2022), section 4.2. https://arxiv.org/abs/2201.05596
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, PRNGKeyArray

from effscale.models import Transformer
from effscale.models.weights import dense
from effscale.training import Loss, StagedStep, Stages, add_reports
from effscale.training.objectives import counted_weights, head_loss
from effscale.training.staged import Changes
from kernels_pallas import kl_divergence

ALONE = "without_teacher"
"""The name of a batch entry whose presence disables the teacher."""


def mixture_of_students_loss(
    model: Transformer,
    batch: Mapping[str, Array],
    key: PRNGKeyArray | None,
    teacher: Transformer,
    *,
    alpha: float = 1.0,
    temperature: float = 1.0,
) -> Loss:
    """Return the student's language-model loss plus the divergence of its distribution from the teacher's, both in nats per token.

    The teacher is the ``frozen`` argument of the step. Its auxiliary losses do not count, and it uses no dropout. Tokens
    without a label count in neither part (in DeepSpeed's code they count in the second). The logits are never
    materialized as a whole.

    Args:
        model: The student, with a head ``lm``.
        batch: As for ``effscale.training.next_token_loss``. With an entry ``without_teacher``, of any value, the result
            is only that loss.
        key: The key in training.
        teacher: Any causal model with the same vocabulary.
        alpha: The weight of the divergence, which is also multiplied by ``temperature**2``, so that its gradient does not shrink.
        temperature: The temperature, by which the logits of both models are divided.

    Returns:
        The sum over tokens. If the teacher is used, metrics include the divergence as ``divergence`` and the loss of only
        the language model as ``task_loss``.

    Raises:
        ValueError: The vocabularies differ.

    Example:
        >>> import functools, jax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from effscale.models import gpt2
        >>> from effscale.training import create_train_state, make_train_step
        >>> make = lambda layers: Transformer(
        ...     gpt2(num_layers=layers, d_model=16, num_heads=2, vocab_size=50, max_length=8), rngs=nnx.Rngs(layers))
        >>> optimizer = optax.adam(1e-3)
        >>> loss = functools.partial(mixture_of_students_loss, temperature=2.0)
        >>> step = staged_distillation(make_train_step(loss, optimizer), stop=400)
        >>> state = create_train_state(make(2), optimizer, key=jax.random.key(0))
        >>> ids = jnp.zeros((1, 8), jnp.int32)
        >>> batch = step.before_step(0, {"input_ids": ids, "labels": ids})
        >>> state, metrics = step(state, batch, frozen=make(4))
        >>> "divergence" in metrics
        True
    """
    given: dict[str, Any] = {
        name: batch.get(name) for name in ("attention_mask", "positions", "segment_ids")
    }
    encoded = model.encode(batch["input_ids"], **given, key=key)
    labels, weights = batch["labels"], batch.get("loss_weights")
    text = head_loss(model, "lm", encoded.hidden, labels, weights)
    loss = add_reports(text, encoded.reports)
    if ALONE in batch:
        return loss
    seen = teacher.encode(batch["input_ids"], **given).hidden
    divergence = _divergence(model, encoded.hidden, teacher, seen, labels, weights, temperature)
    metrics = {"task_loss": text.total, **loss.metrics, "divergence": divergence}
    return Loss(loss.total + alpha * temperature**2 * divergence, loss.weight, metrics)


def staged_distillation(
    step: Callable[..., tuple[Any, Any]], stop: int, **options: Any
) -> StagedStep:
    """Return a step that learns from the teacher up to step ``stop``, and then continues without running the teacher.

    Args:
        step: The result of ``effscale.training.make_train_step`` with ``mixture_of_students_loss``, not jitted.
        stop: The number of steps with the teacher.
        options: Options of ``effscale.training.StagedStep``.

    Returns:
        A step for ``fit(step_fn=step, before_step=step.before_step, frozen=teacher)``.
    """
    return StagedStep(step, *leaving_teacher(stop), **options)


def leaving_teacher(stop: int) -> Changes:
    """Return what changes in a run whose student learns from its teacher up to step ``stop``, for ``effscale.run.Run``.

    Raises:
        ValueError: ``stop`` is below 1.
    """
    if stop < 1:
        raise ValueError(f"stop must be at least 1, got {stop}")

    def mark(batch: Any, learns: bool) -> Any:
        return batch if learns else {**batch, ALONE: np.zeros((), np.float32)}

    return Changes(Stages((0, stop), (True, False)), mark)


def _divergence(
    model: Transformer,
    hidden: Array,
    teacher: Transformer,
    seen: Array,
    labels: Array,
    weights: Array | None,
    temperature: float,
) -> Array:
    own, weight, bias = model.heads["lm"].linear(hidden, model.embed)
    other, teacher_weight, teacher_bias = teacher.heads["lm"].linear(seen, teacher.embed)
    return kl_divergence(
        own.reshape(-1, own.shape[-1]),
        dense(weight),
        other.reshape(-1, other.shape[-1]),
        dense(teacher_weight),
        weights=counted_weights(labels, weights, weight.shape[0]).reshape(-1),
        bias=bias,
        teacher_bias=teacher_bias,
        temperature=temperature,
    )
