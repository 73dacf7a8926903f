r"""LKD: layer-by-layer knowledge distillation, which teaches each quantized layer what its own float layer does.

With :math:`L_k` the layers of the teacher, :math:`\hat L_k` those of the student, and :math:`h_{k-1} = L_{k-1} \circ \dots \circ L_1(x)`
the teacher's hidden states, the student's layer k minimizes

.. math:: \mathrm{mean} \bigl( \hat L_k(h_{k-1}) - L_k(h_{k-1}) \bigr)^2

Its input is the teacher's, so layers do not wait for each other, and besides one layer with its optimizer nothing is trained in
memory. No labels are needed; the text may be of another kind than what the model is used for, or random.

Source: Yao et al., "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers", 2022, section 4.3.
"""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import track

from effscale.models import Transformer, by_layer, replace_layers, take_layers
from effscale.models.validation import check, is_finite
from effscale.quant.fake import FakeQuantizedWeight
from effscale.quant.inputs import captured
from effscale.training import AdamWConfig, Loss, create_train_state, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class LKD:
    """How layers are distilled. The defaults are those of ZeroQuant's published script.

    Example:
        >>> LKD(steps=300).learning_rate
        5e-06
    """

    steps: int = 100
    """Steps of each layer; the batches are gone through again and again."""
    learning_rate: float = 5e-6
    """The learning rate."""
    cosine: bool = False
    """Lower the learning rate to zero along a cosine in each layer's steps; otherwise it is constant, as in the script."""
    optimizer: AdamWConfig = AdamWConfig(b2=0.999, weight_decay=0.01)
    """AdamW."""

    def __post_init__(self):
        check(self, self.steps >= 1, "steps", "at least 1")
        rate = self.learning_rate
        check(self, is_finite(rate) and rate > 0, "learning_rate", "a positive, finite number")


class Distilled(NamedTuple):
    """What `distill_layers` gives: the student, and the losses of every step, ``(layers, steps)``."""

    model: Transformer
    losses: Float[np.ndarray, "layers steps"]


def distill_layers(
    teacher: Transformer,
    student: Transformer,
    batches: Sequence[Mapping[str, Any]],
    config: LKD | None = None,
) -> Distilled:
    """Teaches each layer of a student what the teacher's layer at the same place does.

    The teacher's hidden states of all batches are kept on the host, for one layer at a time.

    Args:
        teacher: A float model of the library.
        student: The same model with fake-quantized weights, from `fake_quantize_model`. Pack it afterwards with
            `quantize_model` and the same recipe.
        batches: ``input_ids`` of shape ``(batch, seq)``, all of one shape, and where present ``attention_mask``, ``positions``,
            ``segment_ids`` and ``type_ids``. Padding does not count. Any text does.
        config: How; None takes the defaults of `LKD`.

    Returns:
        The student with its layers trained, all else as it was, and the losses.

    Raises:
        ValueError: There is no batch, or the models have different numbers of layers.

    Example:
        >>> from flax import nnx
        >>> from effscale.models import gpt2
        >>> from effscale.quant import fake_quantize_model, quantize_model, w4a8
        >>> config = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=64, max_length=8)
        >>> teacher = Transformer(config, rngs=nnx.Rngs(0))
        >>> batch = {"input_ids": jax.random.randint(jax.random.key(0), (4, 8), 0, 64)}
        >>> student = fake_quantize_model(teacher, w4a8())
        >>> found = distill_layers(teacher, student, [batch], LKD(steps=3, learning_rate=1e-3))
        >>> small = quantize_model(found.model, w4a8())

    References:
        Yao et al., `ZeroQuant <https://arxiv.org/abs/2206.01861>`_, 2022
    """
    config = config or LKD()
    count = teacher.config.num_layers
    if student.config.num_layers != count:
        raise ValueError(f"the student has {student.config.num_layers} layers, the teacher {count}")
    batches = list(batches)
    if not batches:
        raise ValueError("batches: there is none")
    is_fake = lambda node: isinstance(node, FakeQuantizedWeight)
    if not any(map(is_fake, jax.tree.leaves(student.groups, is_leaf=is_fake))):
        raise ValueError(
            "the student has no fake-quantized layer: make it with fake_quantize_model"
        )
    rate: Any = config.learning_rate
    if config.cosine:
        rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = config.optimizer.build(rate)
    step = jax.jit(make_train_step(_layer_loss, optimizer, trainable="groups"))
    run = jax.jit(_run)
    first = jax.jit(lambda model, batch: captured(model, batch, capture="layer_in"))
    begin = take_layers(teacher, [0])
    hidden = [np.asarray(by_layer(first(begin, batch), "layer_in")[0]) for batch in batches]
    losses = np.zeros((count, config.steps), np.float32)
    for layer in _with_bar(range(count)):
        own = take_layers(teacher, [layer])
        targets = [np.asarray(run(own, batch, h)) for batch, h in zip(batches, hidden, strict=True)]
        pupil = take_layers(student, [layer])
        state = create_train_state(pupil, optimizer, key=jax.random.key(0), trainable="groups")
        for number in range(config.steps):
            which = number % len(batches)
            lesson = {"hidden": hidden[which], "target": targets[which]}
            state, metrics = step(state, dict(batches[which]) | lesson)
            losses[layer, number] = metrics["loss"]
        student = replace_layers(student, [layer], state.model)
        hidden = targets
    return Distilled(student, losses)


def _with_bar(layers: Sequence[int]) -> Iterable[int]:
    """The layers, with a bar on a terminal."""
    if not sys.stderr.isatty():
        return layers
    return track(layers, "distilling layers", console=Console(stderr=True), transient=True)


def _run(model: Transformer, batch: Mapping[str, Any], hidden: Array) -> Array:
    """The output of a model's only layer for these hidden states, with the positions and masks of the batch."""

    def feed(index: int, group: Any, x: Array, context: Any, cache: Any, key: Any) -> Any:
        del index
        return group(hidden.astype(x.dtype), context, cache, key)

    return by_layer(captured(model, batch, run_group=feed, capture="layer_out"), "layer_out")[0]


def _layer_loss(model: Transformer, batch: Mapping[str, Any], key: Any) -> Loss:
    """The mean square of the difference from the target, over features and real tokens."""
    del key
    found = _run(model, batch, batch["hidden"]).astype(jnp.float32)
    squares = jnp.mean(jnp.square(found - batch["target"].astype(jnp.float32)), axis=-1)
    weights = jnp.ones_like(squares)
    if "attention_mask" in batch:
        weights = (batch["attention_mask"] != 0).astype(squares.dtype)
    return Loss(jnp.sum(squares * weights), jnp.sum(weights))
