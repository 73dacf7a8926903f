"""The model of the experiment ``finetune``: a pretrained model with a new head, and its loss."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from effscale.models import ClassHead, PatchInputs, Transformer, TransformerConfig
from effscale.models.transformer import RunGroup, run_group
from effscale.training import AdamWConfig, Clip, Loss, TrainState, add_reports, make_train_step
from effscale.training.schedules import Schedule


def classifier_config(config: TransformerConfig, num_classes: int) -> TransformerConfig:
    """Replace all heads with a new classification head: on the mean of a text's tokens, or on an image's class token."""
    head = ClassHead(
        num_classes=num_classes,
        pool="first" if isinstance(config.inputs, PatchInputs) else "mean",
        dropout=config.blocks[0].dropout,
    )
    return dataclasses.replace(config, heads=(head,), pooler=False)


def classifier(model: Transformer, num_classes: int, seed: int | jax.Array) -> Transformer:
    """Return a copy of the model with such a head, randomly initialized by a seed or key."""
    new: Any = jax.tree.map(jnp.copy, model)
    new.config = classifier_config(model.config, num_classes)
    new.pooler = None
    (head,) = new.config.heads
    new.heads = nnx.Dict({head.name: head.build(new.config, rngs=nnx.Rngs(seed))})
    return new


def class_loss(
    model: Transformer, batch: Any, key: Any = None, *, run_group: RunGroup = run_group
) -> Loss:
    """Compute the summed cross entropy of each row's class, with the number of correct answers as ``accuracy``.

    Args:
        model: A model with a head named ``classes``.
        batch: ``labels`` and ``weights`` of shape ``(batch,)``, and ``images``, or ``input_ids`` with ``attention_mask``.
        key: Turns on dropout.
        run_group: Runs a group of layers; see ``effscale.models.Transformer.encode``.
    """
    inputs = batch["images"] if "images" in batch else batch["input_ids"]
    mask = batch.get("attention_mask")
    encoded = model.encode(inputs, attention_mask=mask, key=key, run_group=run_group)
    outputs = model.outputs(encoded.hidden, None if mask is None else mask.astype(bool), key)
    logits = outputs["classes"].astype(jnp.float32)
    labels, weights = batch["labels"], batch["weights"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = (logits.argmax(-1) == labels).astype(jnp.float32)
    loss = Loss((losses * weights).sum(), weights.sum(), {"accuracy": (right * weights).sum()})
    return add_reports(loss, encoded.reports)


def make_step(
    config: AdamWConfig, schedule: Schedule, *, clip_norm: float, dropout: bool
) -> tuple[optax.GradientTransformation, Callable[[TrainState, Any], Any]]:
    """Create the optimizer and the training step.

    Args:
        config: Options of AdamW.
        schedule: The learning rate.
        clip_norm: Maximum norm of the gradient.
        dropout: Whether to use the model's dropout rates.
    """
    optimizer = config.build(schedule)
    loss = class_loss if dropout else lambda model, batch, key: class_loss(model, batch)
    return optimizer, make_train_step(loss, optimizer, clip=Clip(clip_norm), learning_rate=schedule)
