r"""LKD: layer-by-layer knowledge distillation, which teaches each quantized layer what its own float layer does.

With $L_k$ the layers of the teacher, $\hat L_k$ those of the student, and $h_{k-1} = L_{k-1} \circ \dots \circ L_1(x)$
the teacher's hidden states, the student's layer k minimizes

$$\mathrm{mean} \bigl( \hat L_k(h_{k-1}) - L_k(h_{k-1}) \bigr)^2$$

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
from jax.sharding import AxisType, NamedSharding, PartitionSpec
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
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Distilled:
    """Teaches each layer of a student what the teacher's layer at the same place does.

    The teacher's hidden states of all batches are kept on the host, for one layer at a time, or one for each of the devices.

    Args:
        teacher: A float model of the library.
        student: The same model with fake-quantized weights, from `fake_quantize_model`. Pack it afterwards with
            `quantize_model` and the same recipe.
        batches: ``input_ids`` of shape ``(batch, seq)``, all of one shape, and where present ``attention_mask``, ``positions``,
            ``segment_ids`` and ``type_ids``. Padding does not count. Any text does.
        config: How; None takes the defaults of `LKD`.
        devices: Devices that teach a layer each at the same time; layers in a row must then have the same formats to be taught together.
            None teaches one layer after another, where the models are.

    Returns:
        The student with its layers trained, all else as it was, and the losses.

    Raises:
        ValueError: There is no batch or no device, or the models have different numbers of layers.

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
    if devices is not None and not devices:
        raise ValueError("devices: there is none")
    if not any(map(is_fake, jax.tree.leaves(student.groups, is_leaf=is_fake))):
        raise ValueError(
            "the student has no fake-quantized layer: make it with fake_quantize_model"
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
    """Trains single layers: one where it is, or one on each of some devices.

    Args:
        optimizer: Of each layer.
        steps: Of each layer.
        devices: None for one layer at a time.
    """

    def __init__(self, optimizer: Any, steps: int, devices: Sequence[jax.Device] | None):
        self.optimizer, self.steps, self.devices = optimizer, steps, devices
        step = make_train_step(_layer_loss, optimizer, trainable="groups")
        self.step = jax.jit(step)
        # Hidden states and targets are each layer's own; what else a batch holds is of all.
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
        """The taught models, and their losses of shape ``(layers, steps)``; the lessons are each layer's inputs and targets."""
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
    """Layers in a row that are alike, at most so many at a time."""

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
