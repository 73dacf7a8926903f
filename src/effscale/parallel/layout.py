"""A mesh together with its sharding rules."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from effscale.parallel.placement import (
    BatchShard,
    batch_shard,
    batch_sharding,
    shard,
    shard_batch,
    shardings,
)
from effscale.parallel.rules import DEFAULT_RULES, Rules, use_rules

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and a table of sharding rules, used both to place arrays and to trace functions.

    Because both come from one object, a model cannot be placed by one table and traced by another. ``shard`` also moves a model
    from the layout of one placement to that of another, for example from training to generation.

    Attributes:
        mesh: The mesh of all participating devices.
        rules: The table from logical axis names to mesh axes.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2
        >>> from effscale.parallel import DEFAULT_RULES, MeshConfig, Placement
        >>> tiny = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> mesh = MeshConfig(fsdp=-1, data=1).build()
        >>> training = Placement(mesh)
        >>> generating = Placement(mesh, DEFAULT_RULES | {"embed": None, "mlp": "fsdp", "mlp_act": "fsdp"})
        >>> model = training.init(lambda: Transformer(tiny, rngs=nnx.Rngs(0)))
        >>> copy = generating.shard(model)  # from one layout to the other
        >>> with generating.in_force():
        ...     logits = jax.jit(lambda model, ids: model(ids))(copy, jnp.zeros((8, 4), jnp.int32))
        >>> logits.shape
        (8, 4, 50)
    """

    mesh: Mesh
    rules: Rules = DEFAULT_RULES

    @contextlib.contextmanager
    def in_force(self) -> Iterator["Placement"]:
        """Activate the mesh and rules in this thread inside the ``with`` block, like ``jax.set_mesh`` and ``use_rules``."""
        with jax.set_mesh(self.mesh), use_rules(self.rules):
            yield self

    def shardings(self, tree: Tree) -> Tree:
        """Return the sharding of each array in a tree; see ``effscale.parallel.shardings``."""
        with use_rules(self.rules):
            return shardings(tree, self.mesh)

    def shard(self, tree: Tree) -> Tree:
        """Place a tree of arrays on the mesh; see ``effscale.parallel.shard``."""
        with use_rules(self.rules):
            return shard(tree, self.mesh)

    def init(self, create: Callable[..., Tree], *args: Any) -> Tree:
        """Run ``create(*args)`` with sharded outputs, so that nothing is ever whole on one device.

        Args:
            create: A function of arrays that JAX can trace, such as one that creates a model or a train state.
            *args: Its arguments.
        """
        with self.in_force():
            places = shardings(jax.eval_shape(create, *args), self.mesh)
            return jax.jit(create, out_shardings=places)(*args)

    def batch_sharding(self) -> NamedSharding:
        """Return the sharding of a batch; see ``effscale.parallel.batch_sharding``."""
        with use_rules(self.rules):
            return batch_sharding(self.mesh)

    def batch_shard(self) -> BatchShard:
        """Return the part of the batch that this process loads; see ``effscale.parallel.batch_shard``."""
        with use_rules(self.rules):
            return batch_shard(self.mesh)

    def shard_batch(self, batch: PyTree) -> PyTree:
        """Place the rows that this process loaded; see ``effscale.parallel.shard_batch``."""
        with use_rules(self.rules):
            return shard_batch(batch, self.mesh)
