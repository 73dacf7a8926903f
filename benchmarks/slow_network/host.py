"""The program of each host: train a small GPT with the optimizer that an order names, and report the time of each step.

Orders are lines of JSON on standard input, the same for all hosts; answers are lines of JSON on standard output.
"""

import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from effscale.command.line import keep_freed_memory
from effscale.models import Transformer, gpt2
from effscale.optim import Workers, lamb, mean_over_workers, onebit_adam, onebit_lamb, zero_one_adam
from effscale.optim.averaging import MeanOverWorkersState
from effscale.parallel import MeshConfig, initialize, per_worker, shard_batch, shardings
from effscale.parallel.workers import gather
from effscale.training import create_train_state, make_train_step, next_token_loss

VOCAB, LENGTH, ROWS = 2048, 64, 1
RATE = 1e-5  # so small that a variance frozen after a few steps does no harm: only the time matters here
CONFIG = gpt2(num_layers=4, d_model=256, num_heads=4, vocab_size=VOCAB, max_length=LENGTH)
COUNTER = pathlib.Path("/sys/class/net/eth0/statistics/tx_bytes")


def bfloat16_mean(axis_name: str) -> optax.GradientTransformation:
    """Average over workers with bfloat16 on the network: each worker averages one part of the gradient in float32.

    It sends as much as a ring, and needs no reduction in bfloat16, which crashes XLA's CPU compiler.
    """
    exact = mean_over_workers(axis_name)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        flat, unravel = jax.flatten_util.ravel_pytree(updates)
        workers = jax.lax.axis_size(axis_name)
        rows = jnp.pad(flat.astype(jnp.bfloat16), (0, -flat.size % workers)).reshape(workers, -1)
        # Send as bits, because XLA may send bfloat16 values in float32.
        bits = jax.lax.bitcast_convert_type(rows, jnp.uint16)
        bits = jax.lax.all_to_all(bits, axis_name, 0, 0)
        parts = jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(parts.mean(0).astype(jnp.bfloat16), jnp.uint16)
        mean = jax.lax.bitcast_convert_type(gather(bits, axis_name), jnp.bfloat16)
        sent = 2 * (workers - 1) / workers * 2 * flat.size
        mean = unravel(mean.reshape(-1)[: flat.size].astype(flat.dtype))
        return mean, MeanOverWorkersState(jnp.float32(sent), state.axis)

    return optax.GradientTransformation(exact.init, update)


def optimizers(warmup: int, scaler: int) -> dict[str, Any]:
    """Return optimizers by name; ``warmup`` steps are uncompressed, and 0/1 Adam's local interval doubles every ``scaler`` steps."""
    return {
        "adam": lambda: optax.chain(mean_over_workers("data"), optax.adam(RATE)),
        "adam_bfloat16": lambda: optax.chain(bfloat16_mean("data"), optax.adam(RATE)),
        "onebit_adam": lambda: onebit_adam(RATE, freeze_step=warmup, workers=Workers("data")),
        "zero_one_adam": lambda: zero_one_adam(
            RATE,
            var_freeze_step=warmup,
            var_update_scaler=2,
            local_step_scaler=scaler,
            local_step_clipper=16,
            workers=Workers("data"),
        ),
        "lamb": lambda: optax.chain(mean_over_workers("data"), lamb(RATE)),
        "onebit_lamb": lambda: onebit_lamb(RATE, freeze_step=warmup, workers=Workers("data")),
    }


class Trainer:
    """Compiles a step once per optimizer, and starts over for each order."""

    def __init__(self):
        self.mesh = MeshConfig().build()
        self.programs: dict[tuple[str, int, int], Any] = {}
        rng = np.random.default_rng(jax.process_index())
        tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
        self.batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}

    def program(self, name: str, warmup: int, scaler: int) -> Any:
        """Return a function that creates the first state, and the step."""
        if (name, warmup, scaler) not in self.programs:
            optimizer = optimizers(warmup, scaler)[name]()
            create = lambda: create_train_state(
                Transformer(CONFIG, rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0)
            )
            layout = shardings(jax.eval_shape(create), self.mesh)
            start = jax.jit(create, out_shardings=layout)
            step = per_worker(make_train_step(next_token_loss, optimizer, axis_name="data"))
            self.programs[name, warmup, scaler] = start, jax.jit(step, donate_argnums=0)
        return self.programs[name, warmup, scaler]

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """Return the times of the steps in seconds, the bytes that this host sent in each, and the bytes by formula."""
        start, step = self.program(order["optimizer"], order["warmup"], order["scaler"])
        batch = shard_batch(self.batch, self.mesh)
        jax.block_until_ready(step(start(), batch))  # compile, and connect all hosts
        state = start()
        seconds, counts, formula = [], [int(COUNTER.read_text())], []
        for i in range(order["steps"]):
            began = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - began)
            formula.append(float(metrics["sent_bytes"]))
            if i == order["steps"] - 1:
                time.sleep(
                    0.5
                )  # a step may end when a host has received everything but not sent everything
            counts.append(int(COUNTER.read_text()))
        size = sum(x.size for x in jax.tree.leaves(state.model))
        loss = float(metrics["loss"])
        return {
            "seconds": seconds,
            "bytes": np.diff(counts).tolist(),
            "formula": formula,
            "parameters": size,
            "loss": loss,
        }


def main() -> None:
    """Answer orders until there are no more."""
    keep_freed_memory()
    initialize()
    with jax.numpy_dtype_promotion("standard"):
        trainer = Trainer()
        with jax.set_mesh(trainer.mesh):
            for line in sys.stdin:
                print(json.dumps(trainer.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
