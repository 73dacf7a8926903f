"""Train a small MLP on one mesh and give its loss curve; imported by the tests and run in several processes."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from effscale.parallel import (
    DEFAULT_RULES,
    MeshConfig,
    batch_shard,
    constrain,
    initialize,
    shard,
    shard_batch,
    shardings,
    use_rules,
)

WIDTH, HIDDEN, DEPTH, BATCH, STEPS = 8, 32, 3, 16, 20


class Block(nnx.Module):
    def __init__(self, *, rngs):
        up = jax.random.normal(rngs.params(), (WIDTH, HIDDEN)) * WIDTH**-0.5
        down = jax.random.normal(rngs.params(), (HIDDEN, WIDTH)) * HIDDEN**-0.5
        self.up = nnx.Param(up, axes=("embed", "mlp"))
        self.bias = nnx.Param(jnp.zeros(HIDDEN), axes=("mlp",))
        self.down = nnx.Param(down, axes=("mlp", "embed"))

    def __call__(self, x):
        h = jax.nn.gelu(x @ self.up[...] + self.bias[...][None])
        return x + constrain(h, "batch", "mlp_act") @ self.down[...]


class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.blocks = jax.vmap(lambda r: Block(rngs=r))(rngs.split(DEPTH))

    def __call__(self, x):
        x = constrain(x, "batch", "embed_act")
        body = jax.checkpoint(lambda x, block: (block(x), None))
        return jax.lax.scan(body, x, self.blocks)[0]


def curve(config: MeshConfig, devices=None) -> list[float]:
    mesh = config.build(devices)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))

    def init(key):
        model = Net(rngs=nnx.Rngs(key))
        return model, optimizer.init(model)

    def step(state, batch):
        model, opt_state = state

        def loss_fn(model):
            return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(model)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
            updates, opt_state = optimizer.update(grads, opt_state, model)
        return (optax.apply_updates(model, updates), opt_state), loss

    key = jax.random.key(0)
    places = shardings(jax.eval_shape(init, key), mesh)
    part = batch_shard(mesh)
    rng = np.random.default_rng(0)
    target = rng.normal(size=(WIDTH, WIDTH)).astype("float32")
    losses = []
    with jax.set_mesh(mesh):
        state = jax.jit(init, out_shardings=places)(key)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
        for _ in range(STEPS):
            x = rng.normal(size=(BATCH, WIDTH)).astype("float32")
            mine = np.split(x, part.count)[part.index]
            batch = shard_batch({"x": mine, "y": np.tanh(mine @ target)}, mesh)
            state, loss = jitted(state, batch)
            losses.append(float(loss))
    return losses


def placed_right(config: MeshConfig) -> bool:
    """Whether a tree that every process holds whole comes out the same when it is laid out on the mesh."""
    mesh = config.build()
    tree = {"model": Net(rngs=nnx.Rngs(0)), "key": jax.random.key(1), "host": np.arange(8.0)}
    placed = shard(tree, mesh)
    with use_rules(DEFAULT_RULES | {"embed": None}):
        again = shard(placed, mesh)
    same = jax.tree.map(lambda a, b: jax.jit(jnp.array_equal)(a, b), placed, again)
    up = placed["model"].blocks.up[...]
    mine = [
        np.array_equal(s.data, tree["model"].blocks.up[...][s.index]) for s in up.addressable_shards
    ]
    return all(mine) and all(map(bool, jax.tree.leaves(same)))


if __name__ == "__main__":
    several = initialize()
    config = MeshConfig(**json.loads(sys.argv[1]))
    if "--place" in sys.argv:
        found = {"placed": placed_right(config)}
    else:
        found = {"several": several, "again": initialize(), "devices": jax.device_count()}
        found |= {"part": batch_shard(config.build()), "losses": curve(config)}
    print(json.dumps(found))
