"""Train a tiny GPT on one mesh and give its loss curve; imported by the tests and run in several processes."""

import json
import sys

import jax
import numpy as np
from flax import nnx

from effscale.models import Transformer, gpt2
from effscale.parallel import MeshConfig, batch_shard, initialize, shard_batch, shardings
from effscale.training import (
    AdamWConfig,
    Checkpoints,
    Clip,
    ShapeBuckets,
    create_train_state,
    make_train_step,
    next_token_loss,
    resume_or_start,
)

VOCAB, LENGTH, BATCH, STEPS = 64, 16, 16, 20
CONFIG = gpt2(num_layers=2, d_model=32, num_heads=8, vocab_size=VOCAB, max_length=LENGTH)


def batch(step: int) -> dict[str, np.ndarray]:
    """The global batch of a step: two segments a row, and unequal weights, so that means must be true means."""
    rng = np.random.default_rng(step)
    tokens = np.cumsum(rng.integers(0, 3, (BATCH, LENGTH + 1)), axis=1).astype(np.int32) % VOCAB
    cut = rng.integers(1, LENGTH, (BATCH, 1))
    where = np.arange(LENGTH)[None]
    return {
        "input_ids": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "segment_ids": 1 + (where >= cut).astype(np.int32),
        "positions": np.where(where >= cut, where - cut, where).astype(np.int32),
        "loss_weights": (where != cut - 1).astype(np.float32)
        * rng.uniform(0.5, 1, (BATCH, 1)).astype(np.float32),
    }


def curve(
    config: MeshConfig,
    devices=None,
    *,
    stop: int = STEPS,
    folder=None,
    accumulate: int = 1,
    model=CONFIG,
    batch=batch,
    learning_rate: float = 3e-3,
) -> list[float]:
    """Losses from the newest checkpoint in ``folder`` (or the start) up to ``stop``; the last state is saved there."""
    mesh = config.build(devices)
    optimizer = AdamWConfig().build(learning_rate)
    create = lambda: create_train_state(
        Transformer(model, rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0)
    )
    step_fn = ShapeBuckets(
        make_train_step(next_token_loss, optimizer, clip=Clip(1.0), accumulate=accumulate),
        donate_argnums=0,
    )
    part, losses = batch_shard(mesh), []
    with jax.set_mesh(mesh):
        layout = shardings(jax.eval_shape(create), mesh)
        if folder is None:
            state, start = jax.jit(create, out_shardings=layout)(), 0
        else:
            checkpoints = Checkpoints(folder)
            state, start = resume_or_start(checkpoints, create, shardings=layout)
        for step in range(start, stop):
            mine = {k: np.split(v, part.count)[part.index] for k, v in batch(step).items()}
            state, metrics = step_fn(state, shard_batch(mine, mesh))
            losses.append(float(metrics["loss"]))
        if folder is not None:
            checkpoints.save(stop, state, force=True)
            checkpoints.close()
    assert step_fn.num_compilations == 1
    return losses


if __name__ == "__main__":
    initialize()
    print(json.dumps({"losses": curve(MeshConfig(**json.loads(sys.argv[1])))}))
