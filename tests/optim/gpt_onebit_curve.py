"""Train a tiny GPT with a 1-bit optimizer on one mesh and give its loss curve; run by the tests in several processes, too."""

import functools
import json
import sys

import jax
import numpy as np
from flax import nnx

from effscale.models import Transformer, gpt2
from effscale.optim import Workers, onebit_adam, onebit_lamb, zero_one_adam
from effscale.parallel import (
    MeshConfig,
    batch_shard,
    initialize,
    per_worker,
    shard_batch,
    shardings,
)
from effscale.training import (
    Checkpoints,
    Clip,
    create_train_state,
    make_train_step,
    next_token_loss,
    resume_or_start,
)

VOCAB, LENGTH, BATCH, STEPS = 64, 16, 16, 12
CONFIG = gpt2(num_layers=2, d_model=32, num_heads=8, vocab_size=VOCAB, max_length=LENGTH)
OPTIMIZERS = {
    "onebit_adam": lambda: onebit_adam(3e-3, freeze_step=6, clip=Clip(1.0), workers=Workers("data")),
    "onebit_lamb": lambda: onebit_lamb(3e-2, freeze_step=6, weight_decay=0.01, workers=Workers("data")),
    "zero_one_adam": lambda: zero_one_adam(
        1e-3, var_freeze_step=6, var_update_scaler=2, local_step_scaler=2, local_step_clipper=2, workers=Workers("data")
    ),
}  # fmt: skip


def batch(step):
    rng = np.random.default_rng(step)
    tokens = np.cumsum(rng.integers(0, 3, (BATCH, LENGTH + 1)), axis=1).astype(np.int32) % VOCAB
    weights = rng.uniform(0.5, 1, (BATCH, LENGTH)).astype(np.float32)
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "loss_weights": weights}


@functools.cache
def program(name, config, devices, accumulate):
    """The mesh, what creates the state, and the compiled step, the same for every curve that has them."""
    mesh = config.build(devices)
    optimizer = OPTIMIZERS[name]()
    create = lambda: create_train_state(
        Transformer(CONFIG, rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0)
    )
    step_fn = per_worker(
        make_train_step(next_token_loss, optimizer, accumulate=accumulate, axis_name="data")
    )
    return mesh, create, jax.jit(step_fn, donate_argnums=0)


def curve(name, config, devices=None, *, stop=STEPS, folder=None, accumulate=1):
    """Losses from the newest checkpoint in ``folder`` (or the start) up to ``stop``, and the last state."""
    devices = tuple(devices or jax.devices())
    mesh, create, step_fn = program(name, config, devices, accumulate)
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
            if start < stop:
                checkpoints.save(stop, state, force=True)
            checkpoints.close()
    return losses, state


if __name__ == "__main__":
    initialize()
    losses, _ = curve(sys.argv[1], MeshConfig(**json.loads(sys.argv[2])))
    print(json.dumps({"losses": losses}))
