"""A tiny training run: the model and data of the tests here, and a script that can be killed at chosen moments."""

import argparse
import os
import pathlib
import signal
import threading
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effscale.data import batch_rows
from effscale.training import (
    AdamWConfig,
    Checkpoints,
    Clip,
    JsonlWriter,
    Loss,
    ScheduleConfig,
    ShapeBuckets,
    create_train_state,
    evaluate,
    fit,
    make_eval_step,
    make_train_step,
    resume_or_start,
)

VOCABULARY, WIDTH, LAYERS, LENGTH, BATCH, ROWS = 16, 8, 2, 6, 8, 64


class Block(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(
            0.3 * jax.random.normal(rngs.params(), (WIDTH, WIDTH)), axes=("embed", "mlp")
        )
        self.bias = nnx.Param(jnp.zeros(WIDTH), axes=("mlp",))

    def __call__(self, x):
        return x + jnp.tanh(x @ self.kernel.get_value() + self.bias.get_value()[None])


class Toy(nnx.Module):
    """Embedding, stacked residual blocks, tied head; logits [batch, length, vocabulary]."""

    def __init__(self, *, rngs):
        table = 0.3 * jax.random.normal(rngs.params(), (VOCABULARY, WIDTH))
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))
        self.blocks = jax.vmap(Block)(rngs.split(LAYERS))

    def __call__(self, ids, key=None):
        table = self.embedding.get_value()
        x = table[ids].reshape(-1, WIDTH)
        if key is not None:
            x = jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x, 0.0)
        x, _ = jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)
        return (x @ table.T).reshape(*ids.shape, VOCABULARY)


def loss_fn(model, batch, key):
    log_probabilities = jax.nn.log_softmax(model(batch["input_ids"], key))
    losses = -jnp.take_along_axis(log_probabilities, batch["labels"][..., None], -1)[..., 0]
    hits = (log_probabilities.argmax(-1) == batch["labels"]).astype(jnp.float32)
    weights = batch["loss_weights"]
    return Loss((losses * weights).sum(), weights.sum(), {"accuracy": (hits * weights).sum()})


def row(index):
    random = np.random.default_rng(int(index))
    ids = (random.integers(VOCABULARY) + 3 * np.arange(LENGTH + 1)) % VOCABULARY
    weights = (np.arange(LENGTH) < random.integers(1, LENGTH + 1)).astype(np.float32)
    return {
        "input_ids": ids[:-1].astype(np.int32),
        "labels": ids[1:].astype(np.int32),
        "loss_weights": weights,
    }


def batches():
    dataset = grain.MapDataset.range(ROWS).seed(0).shuffle().map(row).repeat().batch(BATCH)
    return iter(dataset.to_iter_dataset())


def numbered_batches(process_index=0, process_count=1):
    """The same batches as a process of several reads them, with the numbers of their rows."""
    numbered = lambda index: {**row(index), "row": np.int32(index)}
    rows = grain.MapDataset.range(ROWS).seed(0).shuffle().map(numbered).repeat()
    options = {"process_index": process_index, "process_count": process_count}
    return iter(batch_rows(rows, batch_size=BATCH, **options))


def batches_at(position):
    data = batches()
    data.set_state(position)
    return data


def batch_of(size, start=0):
    rows = [row(start + index) for index in range(size)]
    return {name: np.stack([r[name] for r in rows]) for name in rows[0]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--kill", default="never:0", help="step:N, write:N, manifest:N or term:N")
    args = parser.parse_args()
    kind, _, at = args.kill.partition(":")
    at = int(at)

    schedule = ScheduleConfig(
        kind="cosine", peak=1e-2, warmup=100, total=2000, unit="tokens"
    ).build()
    optimizer = AdamWConfig().build(schedule)
    create = lambda: create_train_state(
        Toy(rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(1), ema=True
    )
    step = make_train_step(
        loss_fn, optimizer, accumulate=2, clip=Clip(1.0), ema_decay=0.9, learning_rate=schedule
    )
    data = batches()
    checkpoints = Checkpoints(args.folder / "checkpoints", config={"width": WIDTH}, every=5, keep=2)
    state, start = resume_or_start(checkpoints, create, data)
    print("start", start, flush=True)
    eval_step = jax.jit(make_eval_step(loss_fn))
    held_out = [batch_of(8, 1000), batch_of(3, 2000)]

    def die():
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def before_step(step, batch):
        if step == at and kind == "step":
            checkpoints.wait()  # however slow the machine: this is a kill between checkpoints
            die()
        if step == at and kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    def watch():
        # Kills as soon as the arrays of a checkpoint begin to be written.
        while not list(
            (args.folder / "checkpoints").glob(f"step_{at:08d}.orbax-checkpoint-tmp/train")
        ):
            time.sleep(0.0002)
        die()

    if kind == "write":
        threading.Thread(target=watch, daemon=True).start()
    if kind == "manifest":
        import effscale.training.checkpoint as module

        write = module.write_manifest
        module.write_manifest = lambda folder, known: (
            die() if folder.name.endswith(f"{at:08d}") else write(folder, known)
        )

    result = fit(
        state,
        ShapeBuckets(step, donate_argnums=0),
        data,
        num_steps=24,
        checkpoints=checkpoints,
        writer=JsonlWriter(args.folder / "metrics.jsonl", resume_step=start),
        evaluate=lambda state: evaluate(state.model, eval_step, held_out, prefix="val_"),
        eval_every=6,
        before_step=before_step,
    )
    leaves = jax.tree.leaves((result.state.model, result.state.opt_state, result.state.ema))
    np.savez(args.folder / "final.npz", *map(np.asarray, leaves))
    print("stopped", result.stopped_reason, int(result.state.step), flush=True)


if __name__ == "__main__":
    main()
