"""The arms of the experiment ``xtc``: their initial models, their losses and their training steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from effscale.experiments.shared.classifier.model import class_loss
from effscale.experiments.xtc.config import Config
from effscale.models import Transformer, take_layers
from effscale.quant import (
    LayerMap,
    Recipe,
    fake_quantize_model,
    one_stage_loss,
    quantize_model,
    w1a8,
    w2a8,
)
from effscale.training import Clip, Loss, make_train_step

TEACHER, FLOAT, TERNARY, BINARY = "teacher", "float", "ternary", "binary"
RECIPES: dict[str, Recipe] = {TERNARY: w2a8(), BINARY: w1a8()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A kind of model to train.

    Attributes:
        kind: ``teacher``, ``float``, ``ternary`` or ``binary``.
        config: Config of the experiment.
    """

    kind: str
    config: Config

    @property
    def name(self) -> str:
        """The name in its runs and figures: ``teacher``, ``ternary_3_layers``."""
        layers = len(self.config.teacher_layers)
        return self.kind if self.kind == TEACHER else f"{self.kind}_{layers}_layers"

    @property
    def budgets(self) -> tuple[int, ...]:
        """Numbers of steps of its runs."""
        return (self.config.teacher_steps,) if self.kind == TEACHER else self.config.budgets

    @property
    def recipe(self) -> Recipe | None:
        """The formats of its weights; None leaves them in float."""
        return RECIPES.get(self.kind)

    def begin(self, origin: Transformer) -> Transformer:
        """Return the model before the first step.

        Args:
            origin: For the teacher a classifier, for the float student the teacher, and for the others the float
            student.
        """
        if self.kind == FLOAT:
            return take_layers(origin, self.config.teacher_layers)
        return origin if self.recipe is None else fake_quantize_model(origin, self.recipe)

    def packed(self, model: Transformer) -> Transformer:
        """Return the model as it would be stored and served."""
        return model if self.recipe is None else quantize_model(model, self.recipe)

    def loss(self) -> Callable[..., Loss]:
        """Return the loss: from labels for the teacher, and from the teacher for all others."""
        if self.kind == TEACHER:
            loss: Callable[..., Loss] = class_loss
        else:
            layers = LayerMap.reduced(self.config.teacher_layers)
            loss = functools.partial(one_stage_loss, layers=layers)
        if self.config.dropout:
            return loss
        return lambda model, batch, key, *teacher: loss(model, batch, None, *teacher)

    def train_step(self) -> Callable[..., Any]:
        """Return a step for all learning rates and budgets, which are values in the optimizer's state."""
        any_rate = self.optimizer(self.config.rates[0], self.budgets[0])
        return make_train_step(self.loss(), any_rate, clip=Clip(self.config.clip_norm))

    def optimizer(self, peak: float, steps: int) -> optax.GradientTransformation:
        """Return AdamW with a learning rate that warms up to ``peak`` and decays linearly to 0 in ``steps`` steps."""
        warmup = int(self.config.warmup * steps)
        rate = optax.inject_hyperparams(_rise_and_fall)(
            peak=peak, warmup=float(warmup), total=float(steps)
        )
        return self.config.optimizer.build(rate)


def _rise_and_fall(peak: Any, warmup: Any, total: Any) -> optax.GradientTransformation:
    """Return the last transformation of an optimizer: a linear warmup to ``peak``, then a linear decay."""

    def rate(count: Any) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        rising = count / jnp.maximum(warmup, 1.0)
        falling = (total - count) / jnp.maximum(total - warmup, 1.0)
        return peak * jnp.where(count < warmup, rising, falling)

    return optax.scale_by_learning_rate(rate)
