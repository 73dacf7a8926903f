r"""One-stage distillation: a small or quantized student learns from the logits, attention scores and hidden states of
its teacher.

Let layer $i$ of the student be matched to layer $a_i$ of the teacher, and the student's hidden states $h_0$ (output
of the embedding), $h_1, \dots$ (outputs of the layers) to the teacher's $h_{r_0}, h_{r_1}, \dots$. The loss is

$$
L = -\frac{1}{C} \sum_c \mathrm{softmax}(z^T)_c \log \mathrm{softmax}(z^S)_c
+ \sum_i \mathrm{MSE}(A^S_i, A^T_{a_i}) + \sum_i \mathrm{MSE}(h^S_i, h^T_{r_i})
$$

for logits $z$ of C classes and attention scores $A$ before the softmax. All terms have the same weight, and labels
are not used. XTC found that this single stage, trained long enough at a good learning rate, does as well as earlier
multi-stage recipes.

To initialize a student with fewer layers from its teacher, use ``effscale.models.take_layers(teacher, [1, 3, 5])``.
From 12 layers the papers choose ``[1, 3, 5, 7, 9, 11]`` or ``[2, 4, 6, 8, 10]``. ``LayerMap.reduced`` of the same
list matches each layer to what it learns from.

References:
    Wu et al., "XTC: Extreme Compression for Pre-trained Transformers Made Simple and Efficient" (2022), section 3.
        https://arxiv.org/abs/2206.01859
    Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding" (2020), for the terms.
        https://arxiv.org/abs/1909.10351
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from effscale.models import Context, Transformer, by_layer, run_group
from effscale.models.points import SCORES
from effscale.options import Bounds, NonNegativeInt, Options, check
from effscale.quant.inputs import GIVEN
from effscale.training import Loss, add_reports

MASKED = -1e2
"""Scores at or below this value are masked and count as zero."""


@dataclasses.dataclass(frozen=True)
class LayerMap(Options):
    """For each layer of the student, the teacher's layer that it learns from.

    Attributes:
        scores: For each layer of the student, the teacher's layer whose attention scores it learns; counted from 0.
        hidden: For the student's embedding and each of its layers, the hidden state of the teacher that it learns: 0
            is the output of the teacher's embedding, and i + 1 is the output of its layer i.

    Example:
        >>> LayerMap.reduced([1, 3, 5])
        LayerMap(scores=(1, 3, 5), hidden=(0, 2, 4, 6))
        >>> LayerMap.even(3, 6) == LayerMap.reduced([1, 3, 5])
        True
    """

    scores: Annotated[tuple[NonNegativeInt, ...], Bounds(at_least=1)]
    hidden: tuple[NonNegativeInt, ...]

    def __post_init__(self):
        super().__post_init__()
        wanted = f"one entry more than scores={self.scores}: the first is for the embedding"
        check(self, len(self.hidden) == len(self.scores) + 1, "hidden", wanted)

    @classmethod
    def reduced(cls, teacher_layers: Sequence[int]) -> "LayerMap":
        """Return the map of a student that was initialized from these layers of its teacher.

        Each layer learns the scores and the hidden state of the teacher's layer it came from. The embedding learns
        the hidden state one layer below the first of them, as in the original code: with ``[2, 4, 6, 8, 10]`` it is
        matched to the output of the teacher's layer 0, and not to the teacher's embedding.

        Args:
            teacher_layers: As for ``effscale.models.take_layers``.
        """
        if not len(teacher_layers):
            raise ValueError("teacher_layers must name at least one layer, got []")
        # If the first layer is 0, the original code's index is -1, which is the teacher's last hidden state.
        begin = max(teacher_layers[0] - 1, 0)
        return cls(tuple(teacher_layers), (begin, *(number + 1 for number in teacher_layers)))

    @classmethod
    def even(cls, student: int, teacher: int) -> "LayerMap":
        """Return an evenly spaced map between a student and a teacher with these numbers of layers.

        If they are equally deep, the map is one to one.

        Raises:
            ValueError: The student's number does not divide the teacher's.
        """
        if student < 1 or teacher % student:
            raise ValueError(
                f"the student's number of layers must divide the teacher's, got {student} and {teacher}. To name the layers, use LayerMap.reduced([...])"
            )
        each = teacher // student
        return cls(
            tuple(i * each + each - 1 for i in range(student)),
            tuple(i * each for i in range(student + 1)),
        )


class DistillationOutputs(NamedTuple):
    """The outputs of a student or teacher that distillation compares.

    Attributes:
        logits: ``(batch, classes)``, or ``(batch, seq, vocab)`` for a language model.
        scores: For each layer, the scaled attention scores before the softmax, ``(batch, heads, seq, keys)``, with or
            without the mask added: a stacked array or a sequence of arrays.
        hidden: The output of the embedding, then of each layer, ``(batch, seq, width)``: a stacked array or a
            sequence of arrays.
    """

    logits: Float[Array, "batch *seq classes"]
    scores: Any
    hidden: Any


class DistillationTerms(NamedTuple):
    """The three terms of the loss for each row."""

    logits: Float[Array, "batch"]
    scores: Float[Array, "batch"]
    hidden: Float[Array, "batch"]

    def total(self) -> Float[Array, "batch"]:
        """Return the sum of the three terms."""
        return self.logits + self.scores + self.hidden


def distillation_loss(
    student: DistillationOutputs,
    teacher: DistillationOutputs,
    layers: LayerMap,
    *,
    real: Bool[Array, "batch seq"] | None = None,
    visible: Bool[Array, "_rows _seq keys"] | None = None,
) -> DistillationTerms:
    """Compute the loss of one-stage distillation for each row, from arrays of any model.

    Each term is a mean over all entries of an array and a sum over layers. Padding and masked scores do not count.
    (DeepSpeed's code counts both; TinyBERT's counts masked scores as zeros.)

    The term of class logits is also averaged over the classes, as in the original, so it is a cross entropy divided
    by their number. Over a vocabulary, that would make the term vanish, so the cross entropy of next-token logits is
    averaged over tokens only. For a single logit (a regression), the term is the squared difference.

    Args:
        student: Outputs of the student, which is trained.
        teacher: Outputs of the teacher; no gradient flows to it.
        layers: The teacher's layer that each of the student's layers learns from.
        real: True at real tokens, False at padding; None if there is no padding.
        visible: True where a query may attend to a key; needed for causal models. None means everywhere. Scores with
            an added mask, at or below -100, count as zeros.

    Returns:
        The terms; the loss of a batch is ``terms.total().mean()``.

    Raises:
        ValueError: The arrays do not match each other or the map; the error names the layer.

    Example:
        >>> random = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
        >>> teacher = DistillationOutputs(random(0, 2, 3), random(1, 4, 2, 1, 5, 5), random(2, 5, 2, 5, 8))  # 4 layers
        >>> student = DistillationOutputs(random(3, 2, 3), random(4, 2, 2, 1, 5, 5), random(5, 3, 2, 5, 8))  # 2 layers
        >>> terms = distillation_loss(student, teacher, LayerMap.even(2, 4))
        >>> terms.total().shape
        (2,)

    References:
        Wu et al., "XTC" (2022). https://arxiv.org/abs/2206.01859
    """
    teacher = jax.lax.stop_gradient(teacher)
    _check_depths(student, teacher, layers)
    pairs = visible
    if real is not None:
        both = real[:, :, None] & real[:, None, :]
        pairs = both if visible is None else both & visible
    scores = hidden = jnp.zeros(student.logits.shape[0], jnp.float32)
    for i, number in enumerate(layers.scores):
        own, other = _pair("scores", i, student.scores[i], number, teacher.scores[number])
        difference = _unmasked(own) - _unmasked(other)
        scores = scores + _row_means(jnp.square(difference).mean(1), pairs)
    for i, number in enumerate(layers.hidden):
        own, other = _pair("hidden", i, student.hidden[i], number, teacher.hidden[number])
        hidden = hidden + _row_means(jnp.square(own - other).mean(-1), real)
    return DistillationTerms(_logits_term(student.logits, teacher.logits, real), scores, hidden)


def one_stage_loss(
    model: Transformer,
    batch: Mapping[str, Any],
    key: PRNGKeyArray | None,
    teacher: Transformer,
    *,
    layers: LayerMap,
    head: str | None = None,
) -> Loss:
    """Compute one-stage distillation as a training objective, for models of this library.

    Pass the teacher to the step as ``frozen``::

        loss = functools.partial(one_stage_loss, layers=LayerMap.reduced([1, 3, 5]))
        step = jax.jit(make_train_step(loss, optimizer))
        state, metrics = step(state, batch, frozen=teacher)

    The scores need the full query-by-key matrix of every layer in memory, for student and teacher. In pre-norm
    models, the last hidden state is the one before the final norm.

    Args:
        model: The student: a model with fewer layers (``effscale.models.take_layers``), quantized weights
            (``fake_quantize_model``), or both.
        batch: ``input_ids`` of shape ``(batch, seq)`` (or ``images``), and optionally ``attention_mask``,
            ``positions``, ``segment_ids``, ``type_ids``, and ``weights`` of rows. Labels are not used.
        key: Turns on the student's dropout; the teacher runs without dropout.
        teacher: A model with the same width and number of heads as the student.
        layers: The teacher's layer that each of the student's layers learns from.
        head: Name of the head whose logits are compared; None uses the only head.

    Returns:
        The loss summed over rows, with the three terms as metrics ``logits_loss``, ``scores_loss`` and
        ``hidden_loss``.

    Raises:
        ValueError: The models do not match each other or the map, or they have several heads and ``head`` is None.

    Example:
        >>> import functools
        >>> from flax import nnx
        >>> from effscale.models import ClassHead, bert, take_layers
        >>> from effscale.quant import fake_quantize_model, w1a8
        >>> config = bert(num_layers=4, d_model=16, num_heads=2, vocab_size=64, max_length=8, heads=(ClassHead(num_classes=3),))
        >>> teacher = Transformer(config, rngs=nnx.Rngs(0))
        >>> student = fake_quantize_model(take_layers(teacher, [1, 3]), w1a8())
        >>> batch = {"input_ids": jnp.arange(16, dtype=jnp.int32).reshape(2, 8)}
        >>> loss = one_stage_loss(student, batch, None, teacher, layers=LayerMap.reduced([1, 3]))
        >>> float(loss.weight), sorted(loss.metrics)
        (2.0, ['hidden_loss', 'logits_loss', 'scores_loss'])

    References:
        Wu et al., "XTC" (2022). https://arxiv.org/abs/2206.01859
    """
    own, context, reports = _outputs(model, batch, key, head, "the student")
    other, _, _ = _outputs(teacher, batch, None, head, "the teacher")
    size = own.hidden[0].shape[1]
    visible = context.allowed(0, size, size)
    terms = distillation_loss(
        own,
        other,
        layers,
        real=context.real,
        visible=None if visible is None else visible[:, 0],
    )
    weights = batch.get("weights")
    weights = jnp.ones_like(terms.logits) if weights is None else weights.astype(jnp.float32)
    metrics = {f"{name}_loss": (term * weights).sum() for name, term in terms._asdict().items()}
    loss = Loss((terms.total() * weights).sum(), weights.sum(), metrics)
    return add_reports(loss, reports)


def _outputs(
    model: Transformer,
    batch: Mapping[str, Any],
    key: PRNGKeyArray | None,
    head: str | None,
    who: str,
) -> tuple[DistillationOutputs, Context, Any]:
    """Return the outputs of a model to compare, with the context of its layers and their reports."""
    first: list[tuple[Array, Context]] = []

    def run(index: int, group: Any, x: Array, context: Context, cache: Any, key: Any) -> Any:
        if index == 0:
            first.append((x, context))
        return run_group(index, group, x, context, cache, key)

    inputs = batch["images"] if "images" in batch else batch["input_ids"]
    given = {name: batch[name] for name in GIVEN if name in batch}
    encoded = model.encode(inputs, **given, key=key, run_group=run, capture=("layer_out", SCORES))
    mask = batch.get("attention_mask")
    outputs = model.outputs(encoded.hidden, None if mask is None else mask.astype(bool), key)
    names = list(model.heads)
    if head is None and len(names) != 1:
        raise ValueError(f"head must be one of {names}, the heads of {who}, got None")
    if head is not None and head not in names:
        raise ValueError(f"head must be one of {names}, the heads of {who}, got {head!r}")
    logits = outputs if isinstance(outputs, jax.Array) else outputs[head or names[0]]
    ((embedded, context),) = first
    hidden = [embedded, *by_layer(encoded.captured, "layer_out")]
    return (
        DistillationOutputs(logits, by_layer(encoded.captured, SCORES), hidden),
        context,
        encoded.reports,
    )


def _check_depths(
    student: DistillationOutputs, teacher: DistillationOutputs, layers: LayerMap
) -> None:
    """Raise unless the student has the map's number of layers and the teacher has the layers it names."""
    for name in ("scores", "hidden"):
        wanted, there = getattr(layers, name), len(getattr(student, name))
        if there != len(wanted):
            raise ValueError(
                f"layers.{name} must have one entry for each of the student's {there} {name}, got {len(wanted)}: {wanted}"
            )
        depth = len(getattr(teacher, name))
        if max(wanted) >= depth:
            raise ValueError(
                f"layers.{name} must be from 0 to {depth - 1}, as the teacher has {depth} {name}, got {wanted}"
            )
    if student.logits.shape != teacher.logits.shape:
        raise ValueError(
            f"student and teacher must have logits of the same shape, got {student.logits.shape} and {teacher.logits.shape}"
        )


def _pair(name: str, i: int, own: Array, number: int, other: Array) -> tuple[Array, Array]:
    """Return entry ``i`` of the student and entry ``number`` of the teacher in float32, after checking that the
    shapes match.
    """
    if own.shape != other.shape:
        raise ValueError(
            f"{name}: entry {i} of the student has shape {own.shape}, and entry {number} of the teacher, which it learns from, has "
            f"{other.shape}. Both models must have the same width and number of heads"
        )
    return own.astype(jnp.float32), other.astype(jnp.float32)


def _unmasked(scores: Array) -> Array:
    return jnp.where(scores <= MASKED, 0.0, scores)


def _row_means(values: Float[Array, "batch *rest"], counted: Array | None) -> Float[Array, "batch"]:
    """Return the mean of each row over the counted entries."""
    if counted is None:
        return values.reshape(values.shape[0], -1).mean(1)
    weights = jnp.broadcast_to(counted, values.shape).astype(values.dtype)
    along = tuple(range(1, values.ndim))
    return (values * weights).sum(along) / jnp.maximum(weights.sum(along), 1.0)


def _logits_term(student: Array, teacher: Array, real: Array | None) -> Float[Array, "batch"]:
    """Return the soft cross entropy of each row, or the squared difference for a single logit."""
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    if student.shape[-1] == 1:
        entropies = jnp.square(student - teacher)[..., 0]
    else:
        entropies = -(jax.nn.softmax(teacher) * jax.nn.log_softmax(student)).sum(-1)
    if student.ndim == 2:
        return entropies / student.shape[-1]
    return _row_means(entropies, real)
