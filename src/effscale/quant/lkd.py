r"""LKD: layer-by-layer knowledge distillation, which trains each quantized layer to match its float layer.

With $L_k$ the layers of the teacher, $\hat L_k$ those of the student, and $h_{k-1} = L_{k-1} \circ \dots \circ L_1(x)$
the teacher's hidden states, the student's layer k minimizes

$$\mathrm{mean} \bigl( \hat L_k(h_{k-1}) - L_k(h_{k-1}) \bigr)^2$$

Each layer's input comes from the teacher, so layers can be trained independently, and only one layer with its
optimizer is trained in memory. No labels are needed. The text may differ from what the model is used for, or may be
random.

References:
    Yao et al., "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers" (2022),
        section 4.3. https://arxiv.org/abs/2206.01861
"""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import track

from effscale.models import Transformer, by_layer, replace_layers, take_layers
from effscale.options import Options, PositiveFloat, PositiveInt
from effscale.quant.fake import FakeQuantizedWeight
from effscale.quant.inputs import captured
from effscale.training import AdamWConfig, Loss, create_train_state, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class LKD(Options):
    """Options of layer-by-layer distillation. The defaults are those of ZeroQuant's published script.

    Example:
        >>> LKD(steps=300).learning_rate
        5e-06
    """

    steps: PositiveInt = 100
    """Optimizer steps per layer; the batches are cycled through."""
    learning_rate: PositiveFloat = 5e-6
    """Learning rate."""
    cosine: bool = False
    """Decay the learning rate to zero along a cosine over the steps of each layer; otherwise it is constant, as in the script."""
    optimizer: AdamWConfig = AdamWConfig(b2=0.999, weight_decay=0.01)
    """Options of AdamW."""


class Distilled(NamedTuple):
    """The result of ``distill_layers``: the student, and the loss of every step, ``(layers, steps)``."""

    model: Transformer
    losses: Float[np.ndarray, "layers steps"]


def distill_layers(
    teacher: Transformer,
    student: Transformer,
    batches: Sequence[Mapping[str, Any]],
    config: LKD | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Distilled:
    """Train each layer of a student to match the teacher's layer at the same position.

    The teacher's hidden states of all batches are kept in host memory, for one layer at a time, or for one layer per
    device.

    Args:
        teacher: A float model of this library.
        student: The same model with fake-quantized weights, from ``fake_quantize_model``. Pack it afterwards with
            ``quantize_model`` and the same recipe.
        batches: ``input_ids`` of shape ``(batch, seq)``, the same shape in all batches, and optionally
            ``attention_mask``, ``positions``, ``segment_ids`` and ``type_ids``. Padding does not count. Any text
            works.
        config: Options; None uses the defaults of ``LKD``.
        devices: Devices that train one layer each at the same time. Only consecutive layers with the same formats are
            trained together. None trains one layer after another, on the device of the models.

    Returns:
        The student with trained layers and everything else unchanged, and the losses.

    Raises:
        ValueError: ``batches`` or ``devices`` is empty, or the models have different numbers of layers.

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
        Yao et al., "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers"
            (2022). https://arxiv.org/abs/2206.01861
    """
    config = config or LKD()
    count = teacher.config.num_layers
    if student.config.num_layers != count:
        raise ValueError(
            f"student must have the teacher's number of layers, {count}, got {student.config.num_layers}"
        )
    batches = list(batches)
    if not batches:
        raise ValueError("batches must not be empty")
    is_fake = lambda node: isinstance(node, FakeQuantizedWeight)
    if devices is not None and not devices:
        raise ValueError("devices must not be empty")
    if not any(map(is_fake, jax.tree.leaves(student.groups, is_leaf=is_fake))):
        raise ValueError(
            "the student has no fake-quantized layer. Convert it with fake_quantize_model"
        )
    rate: Any = config.learning_rate
    if config.cosine:
        rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = config.optimizer.build(rate)
    teach = _Teacher(optimizer, config.steps, devices)
    run = jax.jit(_run)
    first = jax.jit(lambda model, batch: captured(model, batch, capture="layer_in"))
    begin = take_layers(teacher, [0])
    hidden = [np.asarray(by_layer(first(begin, batch), "layer_in")[0]) for batch in batches]
    losses = np.zeros((count, config.steps), np.float32)
    for layers in _with_bar(_taught_together(student, 1 if devices is None else len(devices))):
        lessons = []
        for layer in layers:
            own = take_layers(teacher, [layer])
            targets = [
                np.asarray(run(own, batch, h)) for batch, h in zip(batches, hidden, strict=True)
            ]
            lessons.append((hidden, targets))
            hidden = targets
        pupils = [take_layers(student, [layer]) for layer in layers]
        models, losses[layers] = teach(pupils, batches, lessons)
        for layer, model in zip(layers, models, strict=True):
            student = replace_layers(student, [layer], model)
    return Distilled(student, losses)


class _Teacher:
    """Trains single layers: one at a time, or one on each of several devices.

    Args:
        optimizer: The optimizer of each layer.
        steps: Number of steps of each layer.
        devices: None for one layer at a time.
    """

    def __init__(self, optimizer: Any, steps: int, devices: Sequence[jax.Device] | None):
        self.optimizer, self.steps, self.devices = optimizer, steps, devices
        step = make_train_step(_layer_loss, optimizer, trainable="groups")
        self.step = jax.jit(step)
        # Hidden states and targets differ by layer; everything else in a batch is shared.
        self.steps_together = jax.jit(
            lambda state, own, batch: jax.vmap(lambda state, own: step(state, batch | own))(
                state, own
            )
        )

    def __call__(
        self,
        pupils: Sequence[Transformer],
        batches: Sequence[Mapping[str, Any]],
        lessons: Sequence[tuple[Sequence[np.ndarray], Sequence[np.ndarray]]],
    ) -> tuple[list[Transformer], np.ndarray]:
        """Return the trained models and their losses of shape ``(layers, steps)``; ``lessons`` are each layer's inputs and targets."""
        key = jax.random.key(0)
        states = [
            create_train_state(pupil, self.optimizer, key=key, trainable="groups")
            for pupil in pupils
        ]
        losses = []
        if self.devices is None:
            (state,), ((hidden, targets),) = states, lessons
            for number in range(self.steps):
                which = number % len(batches)
                lesson = {"hidden": hidden[which], "target": targets[which]}
                state, metrics = self.step(state, dict(batches[which]) | lesson)
                losses.append(metrics["loss"])
            return [state.model], np.asarray(jax.device_get(losses))[None]
        mesh = jax.make_mesh(
            (len(pupils),), ("layer",), (AxisType.Auto,), devices=self.devices[: len(pupils)]
        )
        own, shared = (
            NamedSharding(mesh, spec) for spec in (PartitionSpec("layer"), PartitionSpec())
        )
        together = jax.device_put(jax.tree.map(lambda *x: jnp.stack(x), *states), own)
        for number in range(self.steps):
            which = number % len(batches)
            hidden, target = (np.stack([lesson[i][which] for lesson in lessons]) for i in (0, 1))
            each = jax.device_put({"hidden": hidden, "target": target}, own)
            together, metrics = self.steps_together(
                together, each, jax.device_put(dict(batches[which]), shared)
            )
            losses.append(metrics["loss"])
        models = jax.device_get(together.model)
        found = [jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), models) for i in range(len(pupils))]
        return found, np.asarray(jax.device_get(losses)).T


def _taught_together(student: Transformer, most: int) -> list[list[int]]:
    """Group consecutive layers that are alike, at most ``most`` in a group."""

    def form(layer: int) -> Any:
        pupil = jax.eval_shape(lambda: take_layers(student, [layer]))
        return jax.tree.structure(pupil), [x.shape for x in jax.tree.leaves(pupil)]

    forms = [form(layer) for layer in range(student.config.num_layers)]
    found: list[list[int]] = []
    for layer, own in enumerate(forms):
        if found and len(found[-1]) < most and own == forms[found[-1][0]]:
            found[-1].append(layer)
        else:
            found.append([layer])
    return found


def _with_bar(layers: Sequence[list[int]]) -> Iterable[list[int]]:
    """Iterate over the layers, with a progress bar on a terminal."""
    if not sys.stderr.isatty():
        return layers
    return track(layers, "distilling layers", console=Console(stderr=True), transient=True)


def _run(model: Transformer, batch: Mapping[str, Any], hidden: Array) -> Array:
    """Return the output of a one-layer model for these hidden states, with the positions and masks of the batch."""

    def feed(index: int, group: Any, x: Array, context: Any, cache: Any, key: Any) -> Any:
        del index
        return group(hidden.astype(x.dtype), context, cache, key)

    return by_layer(captured(model, batch, run_group=feed, capture="layer_out"), "layer_out")[0]


def _layer_loss(model: Transformer, batch: Mapping[str, Any], key: Any) -> Loss:
    """Compute the mean squared difference from the target, over features and real tokens."""
    del key
    found = _run(model, batch, batch["hidden"]).astype(jnp.float32)
    squares = jnp.mean(jnp.square(found - batch["target"].astype(jnp.float32)), axis=-1)
    weights = jnp.ones_like(squares)
    if "attention_mask" in batch:
        weights = (batch["attention_mask"] != 0).astype(squares.dtype)
    return Loss(jnp.sum(squares * weights), jnp.sum(weights))
