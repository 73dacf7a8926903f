"""The compression error of the 1-bit mean, which workers and servers keep and add the next time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from effscale.parallel.onebit.layout import TensorLayout, check_real, tensor_layouts
from kernels_pallas.sign_compress.reference import quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
    """The compression error of one tensor, stored as the numbers whose signs were sent.

    Attributes:
        corrected: float32, the sum of the values and the previous error.
        scale: float32 scalar that multiplied the signs.
        spec: How ``corrected`` is divided over the mesh axes other than the workers' axis.
    """

    corrected: Any
    scale: Any
    spec: P = dataclasses.field(default=P(), metadata={"static": True})

    @property
    def error(self) -> jax.Array:
        """``corrected - scale * sign(corrected)``, which is added the next time; undefined in a server's padding."""
        scale = jnp.expand_dims(self.scale, range(self.scale.ndim, self.corrected.ndim))
        corrected = jnp.asarray(self.corrected)  # may be on the host
        return corrected - quantized(corrected, scale)

    def partition_specs(self) -> list[P]:
        """Return the sharding of each array, for ``effscale.parallel.shardings``."""
        return [self.spec, P()]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ErrorFeedback:
    """The errors that a worker keeps: of everything it sends, and of the part for which it is the server.

    Attributes:
        worker: The tree with a ``Residual`` of the same shape in place of each tensor.
        server: The same for the worker's part, padded: [shards, 8, bytes].
    """

    worker: Any
    server: Any


def init_error_feedback(tree: Any, num_workers: int, specs: Any = None) -> ErrorFeedback:
    """Return one worker's errors before the first mean: zeros.

    Args:
        tree: Arrays with the shapes of those to average.
        num_workers: Number of workers.
        specs: As in ``effscale.parallel.compressed_mean``.

    Example:
        >>> errors = init_error_feedback({"w": jnp.ones((3, 5))}, num_workers=4)
        >>> errors.worker["w"].corrected.shape, errors.server["w"].corrected.shape
        ((3, 5), (1, 8, 1))
    """
    check_real(tree)
    pairs = [_zeros(layout) for layout in tensor_layouts(tree, num_workers, specs)]
    worker, server = zip(*pairs, strict=True) if pairs else ((), ())
    structure = structure_of(tree)
    return ErrorFeedback(
        jax.tree.unflatten(structure, worker), jax.tree.unflatten(structure, server)
    )


def structure_of(tree: Any) -> Any:
    """Return the structure of a tree's errors, without the ``nnx.Variable`` around each array.

    ``nnx.Optimizer`` wraps each leaf of a state in a separate variable and unwraps it again; it cannot restore a ``Residual``
    that is inside a variable.
    """
    return jax.tree.structure(nnx.as_pure(tree))


def _zeros(layout: TensorLayout) -> tuple[Residual, Residual]:
    def zeros(shape: tuple[int, ...], spec: P) -> Residual:
        return Residual(jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.float32), spec)

    return (
        zeros(layout.shape, layout.spec),
        zeros((layout.shards, 8, layout.bytes), layout.shard_spec),
    )


def check_errors(
    layouts: list[TensorLayout], worker: list[Residual], server: list[Residual]
) -> None:
    """Raise a ``ValueError`` for errors of a different tree or number of workers."""
    for layout, at_worker, at_server in zip(layouts, worker, server, strict=True):
        expected = (layout.shape, (layout.shards, 8, layout.bytes))
        found = (jnp.shape(at_worker.corrected), jnp.shape(at_server.corrected))
        if found != expected:
            raise ValueError(
                f"errors of shapes {found} for an array of shape {layout.shape} in {layout.shards} shards among "
                f"{layout.servers} workers, which needs {expected}. They belong to another tree, another number "
                "of workers or another division over mesh axes. An nnx.Optimizer drops the axes of its variables: pass "
                "specs= to the transformation"
            )
