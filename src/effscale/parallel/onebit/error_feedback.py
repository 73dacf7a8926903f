"""What the signs of the 1-bit mean left out, kept by workers and servers for the next time."""

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
    """What is left of a tensor after its signs were sent, kept as the numbers whose signs they were.

    Attributes:
        corrected: float32, the numbers: values and last error in sum.
        scale: float32 scalar, what the signs were multiplied by.
        spec: How ``corrected`` is divided over the mesh axes other than the workers'.
    """

    corrected: Any
    scale: Any
    spec: P = dataclasses.field(default=P(), metadata={"static": True})

    @property
    def error(self) -> jax.Array:
        """``corrected - scale * sign(corrected)``, which is added the next time; in a server's padding it means nothing."""
        scale = jnp.expand_dims(self.scale, range(self.scale.ndim, self.corrected.ndim))
        corrected = jnp.asarray(self.corrected)  # which may be on the host
        return corrected - quantized(corrected, scale)

    def partition_specs(self) -> list[P]:
        """How each array is divided, for ``effscale.parallel.shardings``."""
        return [self.spec, P()]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ErrorFeedback:
    """The errors that a worker keeps: of all it sends, and of the part that it is the server of.

    Attributes:
        worker: The tree with a ``Residual`` of the same shape in the place of each tensor.
        server: The same with the worker's part: [shards, 8, bytes], padded.
    """

    worker: Any
    server: Any


def init_error_feedback(tree: Any, num_workers: int, specs: Any = None) -> ErrorFeedback:
    """One worker's errors before the first mean: zeros.

    Args:
        tree: Arrays like those to be averaged.
        num_workers: Workers that take part.
        specs: See ``effscale.parallel.compressed_mean``.

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
    """The structure of a tree's errors: without the ``nnx.Variable`` around an array.

    ``nnx.Optimizer`` puts each leaf of a state into a variable of its own, and takes it out again; it does not find its way back to
    a ``Residual`` that sits in one.
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
    """Raise a ``ValueError`` for errors of another tree or of another number of workers."""
    for layout, at_worker, at_server in zip(layouts, worker, server, strict=True):
        expected = (layout.shape, (layout.shards, 8, layout.bytes))
        found = (jnp.shape(at_worker.corrected), jnp.shape(at_server.corrected))
        if found != expected:
            raise ValueError(
                f"errors of shapes {found} for an array of shape {layout.shape} in {layout.shards} shards among "
                f"{layout.servers} workers, which needs {expected}: they are those of another tree, another number "
                "of workers or another division over mesh axes (an nnx.Optimizer drops the axes of its variables: give the "
                "transformation specs=)"
            )
