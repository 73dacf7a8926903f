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
    r"""The mean loss of each row under a model that is already trained, in nats a token.

    $$\frac{\sum_t w_t \ell_t}{\sum_t w_t}$$

    over the row's own tokens; 0 for a row without weight. A metric for `analyze`. The original
    has none like it, as its values are integers. For losses that come from elsewhere no class is
    needed: any function from a batch to losses is a metric.

    The model sees ``rows`` rows at a time, always as many, so that one program is compiled a length and
    a row's loss does not depend on the batch it comes in.
    """

    def __init__(
        self,
        model: Any,
        loss: Callable[..., Loss] = next_token_loss,
        *,
        rows: int = 8,
        length: int | None = None,
    ):
        """Prepares the metric.

        Args:
            model: The reference model, on the device where it is to run.
            loss: From ``(model, batch)`` to a `Loss`; a function of a module, to be picklable.
            rows: Rows in one call of the model.
            length: Pad all rows to so many tokens, so that rows of many lengths need one program;
                None takes them as they come. Fields whose first axis is not that of the tokens stay
                as they are.

        Raises:
            ValueError: ``rows`` is below 1.
        """
        if rows < 1:
            raise ValueError(f"rows={rows}: it must be at least 1.")
        self.model, self.loss, self.rows, self.length = model, loss, rows, length

    @property
    def digest(self) -> str:
        """Tells models and losses apart, by their weights and names."""
        digest = hashlib.blake2b(digest_size=16)
        for path, leaf in jax.tree.leaves_with_path(self.model):
            array = np.asarray(leaf)
            digest.update(f"{path}{array.dtype}{array.shape}".encode() + array.tobytes())
        # A loss without a name of its own, such as a partial, is known by its representation.
        name = getattr(self.loss, "__qualname__", repr(self.loss))
        digest.update(f"{name}-{self.length}".encode())
        return digest.hexdigest()

    def __call__(self, batch: Batch) -> Float32[np.ndarray, " rows"]:
        """The loss of each row."""
        count, length = batch["input_ids"].shape
        if self.length is not None and length > self.length:
            raise ValueError(
                f"a row of {length} tokens: length={self.length} must be at least that."
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
        # How hard a row is, without what layers add to balance their experts.
        return found.means().get("task_loss", found.mean())

    return jax.vmap(one)(batch).astype(np.float32)
