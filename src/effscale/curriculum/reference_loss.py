"""The loss of a reference model as a difficulty."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float32

from effscale.curriculum.metrics import NO_LABEL, Batch
from effscale.training import Loss, next_token_loss


class ReferenceLoss:
    r"""The mean loss of each row under a trained reference model, in nats per token.

    $$\frac{\sum_t w_t \ell_t}{\sum_t w_t}$$

    over the row's own tokens; 0 for a row without weight. It is a metric for `analyze`. DeepSpeed
    has no such metric, because its metrics are integers. If you have losses from elsewhere, no class is
    needed: any function from a batch to losses is a metric.

    The model always sees ``rows`` rows at a time, so that one program is compiled per length and
    the loss of a row does not depend on the rest of the batch.
    """

    def __init__(
        self,
        model: Any,
        loss: Callable[..., Loss] = next_token_loss,
        *,
        rows: int = 8,
        length: int | None = None,
    ):
        """Create the metric.

        Args:
            model: The reference model, on the device on which to run it.
            loss: A function from ``(model, batch)`` to a `Loss`; a function of a module, so that it can be pickled.
            rows: The number of rows in one call of the model.
            length: Pad all rows to this number of tokens, so that rows of different lengths need only one program;
                None does not pad. Fields whose first axis is not that of the tokens are not
                changed.

        Raises:
            ValueError: ``rows`` is below 1.
        """
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        self.model, self.loss, self.rows, self.length = model, loss, rows, length

    @property
    def digest(self) -> str:
        """The digest, which depends on the weights of the model and the name of the loss."""
        digest = hashlib.blake2b(digest_size=16)
        for path, leaf in jax.tree.leaves_with_path(self.model):
            array = np.asarray(leaf)
            digest.update(f"{path}{array.dtype}{array.shape}".encode() + array.tobytes())
        # A loss without a name, such as a partial, is identified by its representation.
        name = getattr(self.loss, "__qualname__", repr(self.loss))
        digest.update(f"{name}-{self.length}".encode())
        return digest.hexdigest()

    def __call__(self, batch: Batch) -> Float32[np.ndarray, " rows"]:
        """Return the loss of each row."""
        count, length = batch["input_ids"].shape
        if self.length is not None and length > self.length:
            raise ValueError(
                f"length must be at least {length}, the tokens of a row, got {self.length}"
            )
        if "attention_mask" not in batch and "segment_ids" not in batch:
            batch = {**batch, "segment_ids": np.ones((count, length), np.int32)}
        extra = 0 if self.length is None else self.length - length
        losses = np.zeros(count, np.float32)
        for start in range(0, count, self.rows):
            stop = min(start + self.rows, count)
            missing = self.rows - (stop - start)
            chunk = {}
            for key, values in batch.items():
                padding = [(0, missing), *[(0, 0)] * (values.ndim - 1)]
                if values.shape[1:2] == (length,):
                    padding[1] = (0, extra)
                fill = NO_LABEL if key == "labels" else 0
                chunk[key] = np.pad(values[start:stop], padding, constant_values=fill)
            losses[start:stop] = _row_losses(self.model, chunk, self.loss)[: stop - start]
        return losses


@functools.partial(jax.jit, static_argnames="loss")
def _row_losses(model: Any, batch: Any, loss: Callable[..., Loss]) -> Float32[Array, " rows"]:
    def one(row):
        found = loss(model, {key: values[None] for key, values in row.items()})
        # The difficulty of a row, without the losses that balance experts.
        return found.means().get("task_loss", found.mean())

    return jax.vmap(one)(batch).astype(np.float32)
