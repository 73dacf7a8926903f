"""Train a tiny GPT with experts on one mesh and give its loss curve; imported by the tests and run in several processes."""

import json
import sys

import jax
import numpy as np
from flax import nnx

from effscale.models import MLPConfig, Transformer, gpt2
from effscale.moe import MoEConfig, RouterConfig, with_experts
from effscale.parallel import (
    Exchange,
    MeshConfig,
    batch_shard,
    initialize,
    shard_batch,
    shardings,
)
from effscale.training import (
    AdamWConfig,
    Checkpoints,
    Clip,
    create_train_state,
    make_train_step,
    next_token_loss,
    resume_or_start,
)

VOCAB, LENGTH, BATCH, STEPS = 64, 16, 16, 9
DENSE = gpt2(num_layers=2, d_model=16, num_heads=4, vocab_size=VOCAB, max_length=LENGTH)
EXPERT = MLPConfig(d_ff=32)


def model(exchange: Exchange):
    """Two experts of eight for each token, and a dense part; who has no place at capacity factor 1 is the same on any mesh."""
    router = RouterConfig(k=2, balance=0.1, noise="gumbel_second")
    moe = MoEConfig(
        num_experts=8, expert=EXPERT, router=router, shared=EXPERT, groups=8, exchange=exchange
    )
    return with_experts(DENSE, moe, every=1)


def batch(step: int) -> dict[str, np.ndarray]:
    """The global batch of a step, with padding."""
    rng = np.random.default_rng(step)
    tokens = np.cumsum(rng.integers(0, 3, (BATCH, LENGTH + 1)), axis=1).astype(np.int32) % VOCAB
    real = np.arange(LENGTH)[None] < rng.integers(LENGTH // 2, LENGTH + 1, (BATCH, 1))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "attention_mask": real}


def curve(
    config: MeshConfig, devices=None, *, stop: int = STEPS, folder=None, exchange=None
) -> list[float]:
    """Losses from the newest checkpoint in ``folder`` (or the start) up to ``stop``; the last state is saved there."""
    mesh = config.build(devices)
    optimizer = AdamWConfig().build(1e-2)
    built = model(exchange or Exchange())
    create = lambda: create_train_state(
        Transformer(built, rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0)
    )
    step_fn = jax.jit(make_train_step(next_token_loss, optimizer, clip=Clip(1.0)), donate_argnums=0)
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
            checkpoints.wait()
    return losses


if __name__ == "__main__":
    initialize()
    given = json.loads(sys.argv[1])
    losses = curve(MeshConfig(**given), exchange=Exchange(host_devices=4))
    print(json.dumps({"losses": losses}), flush=True)
