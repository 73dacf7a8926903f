"""Training objectives of language models, as functions that return an ``effscale.training.Loss``."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effscale.models import Transformer, Weight, aux_loss, matmul, run_group
from effscale.models.reports import report_means
from effscale.models.transformer import RunGroup
from effscale.models.weights import transpose
from effscale.parallel.rules import auto_batch_axes
from effscale.training.loss import Loss
from kernels_pallas import cross_entropy
from kernels_pallas.cross_entropy.chunked import chunk_size, split_tokens, token_losses


def next_token_loss(
    model: Transformer,
    batch: Mapping[str, Array],
    key: PRNGKeyArray | None = None,
    *,
    z_loss: float = 0.0,
    run_group: RunGroup = run_group,
) -> Loss:
    r"""Return the summed cross entropy of each next token, without materializing all logits.

    $$L = \sum_t w_t \left(-\log p(y_t \mid x_{\le t}) + z \log^2 Z_t\right)$$

    Args:
        model: A causal model with a head named ``lm``.
        batch: ``input_ids`` and ``labels`` of shape ``(batch, seq)``, and optionally ``loss_weights``, ``attention_mask``,
            ``segment_ids`` and ``positions``. A label outside the vocabulary, such as -100, is ignored.
        key: The key of dropout; None disables it.
        z_loss: The coefficient of the squared log normalizer.
        run_group: How to run a group of layers; see ``Transformer.encode``.

    Returns:
        The sum of the loss and of the weights. Their quotient is in nats per token.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from effscale.models import gpt2
        >>> tiny = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> model = Transformer(tiny, rngs=nnx.Rngs(0))
        >>> ids = jnp.arange(8)[None]
        >>> loss = next_token_loss(model, {"input_ids": ids, "labels": ids + 1})
        >>> float(loss.weight)
        8.0
    """
    encoded = model.encode(
        batch["input_ids"],
        attention_mask=batch.get("attention_mask"),
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        key=key,
        run_group=run_group,
    )
    weights = batch.get("loss_weights")
    loss = head_loss(model, "lm", encoded.hidden, batch["labels"], weights, z_loss=z_loss)
    return add_reports(loss, encoded.reports)


def masked_token_loss(
    model: Transformer,
    batch: Mapping[str, Array],
    key: PRNGKeyArray | None = None,
    *,
    run_group: RunGroup = run_group,
) -> Loss:
    """Return the summed cross entropy of the masked tokens of each row, the pretraining loss of BERT.

    Args:
        model: A model with a head named ``mlm``.
        batch: ``input_ids`` with tokens masked, and ``labels``, both of shape ``(batch, seq)``: the original token at masked
            positions, and elsewhere a number outside the vocabulary, such as -100. Optionally ``attention_mask``,
            ``loss_weights``, ``segment_ids``, ``positions`` and ``type_ids``.
        key: The key of dropout; None disables it.
        run_group: How to run a group of layers; see ``Transformer.encode``.

    Returns:
        The sum of the loss and of the weights. Their quotient is in nats per masked token.

    References:
        Devlin et al., "BERT" (2018), section 3.1. https://arxiv.org/abs/1810.04805

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from effscale.models import bert, bert_pretraining_heads
        >>> tiny = bert(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=8, heads=bert_pretraining_heads())
        >>> model = Transformer(tiny, rngs=nnx.Rngs(0))
        >>> ids = jnp.arange(8)[None]
        >>> loss = masked_token_loss(model, {"input_ids": ids, "labels": jnp.where(ids % 4 == 0, ids, -100)})
        >>> float(loss.weight)
        2.0
    """
    encoded = model.encode(
        batch["input_ids"],
        attention_mask=batch.get("attention_mask"),
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        type_ids=batch.get("type_ids"),
        key=key,
        run_group=run_group,
    )
    weights = batch.get("loss_weights")
    loss = head_loss(model, "mlm", encoded.hidden, batch["labels"], weights)
    return add_reports(loss, encoded.reports)


def add_reports(loss: Loss, reports: Any) -> Loss:
    r"""Return a loss extended by the reports of the model's layers: their auxiliary losses are added, the rest become metrics.

    $$\frac{L}{w} \to \frac{L}{w} + \sum_l a_l$$

    The auxiliary losses $a_l$ come with their coefficients from the layers. They are means over the tokens that a layer
    sees, so the sum $L$ grows by $w \sum_l a_l$, and micro-batches count by their weights. The objectives of this
    module already do this; call this function at the end of a custom loss.

    Args:
        loss: The loss of the task.
        reports: The reports of ``effscale.models.Transformer.encode``.

    Returns:
        The loss. If layers report an ``aux_loss``, its metrics contain that sum as ``aux_loss`` and the loss without it, which
        gives the perplexity, as ``task_loss``. Other scalars and vectors become metrics under their names, as in
        ``effscale.models.report_means``. Without reports the result is ``loss`` itself.

    Raises:
        ValueError: A report has the name of an existing metric of ``loss``; see ``effscale.models.aux_loss``.

    Example:
        >>> import jax.numpy as jnp
        >>> reports = (({"aux_loss": jnp.array([0.1, 0.2]), "load": jnp.array([[3.0, 1.0], [2.0, 2.0]])},),)
        >>> loss = add_reports(Loss(jnp.float32(6.0), jnp.float32(3.0)), reports)
        >>> round(float(loss.mean()), 3), float(loss.means()["task_loss"]), loss.means()["load"].tolist()
        (2.3, 2.0, [2.5, 1.5])
    """
    means, extra = report_means(reports), aux_loss(reports)
    weight = jnp.asarray(loss.weight, jnp.float32)
    total = loss.total
    metrics = {name: weight * mean for name, mean in means.items()}
    if extra is not None:
        total = jnp.asarray(total, jnp.float32)
        metrics |= {"task_loss": total, "aux_loss": weight * extra}
        total = total + weight * extra
    if not metrics:
        return loss
    if taken := metrics.keys() & loss.metrics.keys():
        raise ValueError(
            f"layers report {sorted(taken)}, which are already metrics of the loss. Rename the metrics of the loss."
        )
    return Loss(total, loss.weight, {**loss.metrics, **metrics})


def head_loss(
    model: Transformer,
    head: str,
    hidden: Float[Array, "batch seq d_model"],
    labels: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"] | None = None,
    *,
    z_loss: float = 0.0,
) -> Loss:
    """Return the cross entropy under a vocabulary head, for custom objectives, without materializing all logits.

    Args:
        model: A model with the head.
        head: The name of the head, ``lm`` or ``mlm``.
        hidden: The hidden states from ``effscale.models.Transformer.encode``.
        labels: Token ids; a label outside the vocabulary, such as -100, is ignored.
        weights: The weight of each token; None means 1.
        z_loss: The coefficient of the squared log normalizer.

    Returns:
        The sum of the loss and of the weights, without the reports of the layers; see ``add_reports``.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from effscale.models import gpt2
        >>> tiny = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> model, ids = Transformer(tiny, rngs=nnx.Rngs(0)), jnp.arange(8, dtype=jnp.int32)[None]
        >>> encoded = model.encode(ids)
        >>> loss = add_reports(head_loss(model, "lm", encoded.hidden, ids + 1), encoded.reports)
        >>> float(loss.weight)
        8.0
    """
    x, weight, bias = model.heads[head].linear(hidden, model.embed)
    weights = counted_weights(labels, weights, weight.shape[0]).reshape(-1)
    total = vocabulary_cross_entropy(
        x.reshape(-1, x.shape[-1]),
        weight,
        labels.reshape(-1),
        weights=weights,
        bias=bias,
        z_loss=z_loss,
        token_axes=auto_batch_axes(hidden.shape[0]),
    )
    return Loss(total, weights.sum())


def counted_weights(
    labels: Int[Array, "*batch"], weights: Array | None, vocab_size: int
) -> Float[Array, "*batch"]:
    """Return the weight of each token: as given (default 1), and 0 where its label is outside the vocabulary."""
    weights = jnp.ones(labels.shape, jnp.float32) if weights is None else weights
    return jnp.where((labels >= 0) & (labels < vocab_size), weights, 0.0)


# The number of tokens whose logits exist at the same time.
CHUNK = 512


def vocabulary_cross_entropy(
    hidden: Float[Array, "tokens width"],
    weight: Any,
    labels: Int[Array, "tokens"],
    *,
    weights: Float[Array, "tokens"],
    bias: Float[Array, "vocab"] | None,
    z_loss: float,
    token_axes: Sequence[str],
) -> Float[Array, ""]:
    """Return the cross entropy over the vocabulary: `kernels_pallas.cross_entropy`, extended to structured weights.

    A structured weight (packed, or a LoRA pair) is never made dense: its ``matmul`` method computes the logits, in the type of
    ``hidden``. They are summed in float32, and computed again in the backward pass.

    Args:
        hidden: The input of the head.
        weight: Any weight of shape ``(vocab, width)``.
        labels: Labels in ``[0, vocab)``; any other label is ignored if its weight is 0.
        weights: The weight of each token.
        bias: The bias of the logits, or None.
        z_loss: The coefficient of the squared log normalizer.
        token_axes: The mesh axes that shard the tokens. Only plain arrays use them; for structured weights the compiler decides.
    """
    if not isinstance(weight, Weight):
        return cross_entropy(
            hidden,
            weight,
            labels,
            weights=weights,
            bias=bias,
            z_loss=z_loss,
            token_axes=token_axes,
        )
    project = transpose(weight)

    @jax.checkpoint
    def sum_of_chunk(inputs: tuple[Array, Array, Array]) -> Array:
        hidden, labels, weights = inputs
        logits = matmul(hidden, project).astype(jnp.float32)
        if bias is not None:
            logits = logits + bias.astype(jnp.float32)[None]
        losses = token_losses(logits, labels, jax.nn.logsumexp(logits, axis=1), z_loss)
        return jnp.sum(weights * losses)

    chunk = chunk_size(hidden.shape[0], CHUNK)
    labels = jnp.where((labels >= 0) & (labels < weight.shape[0]), labels, -1)
    chunks = tuple(split_tokens(x, chunk) for x in (hidden, labels, weights))
    return jax.lax.map(sum_of_chunk, chunks).sum()
