"""What runs on each host: a small GPT trains with the optimizer that an order names, and the time of each step is told.

Orders are lines of JSON on standard input, the same for all hosts; answers are lines of JSON on standard output.
"""

import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from effscale.models import Transformer, gpt2
from effscale.optim import lamb, mean_over_workers, onebit_adam, onebit_lamb, zero_one_adam
from effscale.parallel import MeshConfig, initialize, per_worker, shard_batch, shardings
from effscale.training import create_train_state, make_train_step, next_token_loss

VOCAB, LENGTH, ROWS = 2048, 64, 1
RATE = 1e-5  # so small that a variance frozen after a few steps does no harm: what is asked here is time
CONFIG = gpt2(num_layers=4, d_model=256, num_heads=4, vocab_size=VOCAB, max_length=LENGTH)
COUNTER = pathlib.Path("/sys/class/net/eth0/statistics/tx_bytes")


def optimizers(warmup: int) -> dict[str, Any]:
    """By name; ``warmup`` steps are uncompressed."""
    return {
        "adam": lambda: optax.chain(mean_over_workers("data"), optax.adam(RATE)),
        "onebit_adam": lambda: onebit_adam(RATE, freeze_step=warmup, axis_name="data"),
        "zero_one_adam": lambda: zero_one_adam(
            RATE,
            var_freeze_step=warmup,
            var_update_scaler=2,
            local_step_scaler=max(1, warmup // 2),
            local_step_clipper=16,
            axis_name="data",
        ),
        "lamb": lambda: optax.chain(mean_over_workers("data"), lamb(RATE)),
        "onebit_lamb": lambda: onebit_lamb(RATE, freeze_step=warmup, axis_name="data"),
    }


class Trainer:
    """Compiles a step once an optimizer, and starts anew at each order."""

    def __init__(self):
        self.mesh = MeshConfig().build()
        self.programs: dict[tuple[str, int], Any] = {}
        rng = np.random.default_rng(jax.process_index())
        tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
        self.batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}

    def program(self, name: str, warmup: int) -> Any:
        """What makes the first state, and the step."""
        if (name, warmup) not in self.programs:
            optimizer = optimizers(warmup)[name]()
            create = lambda: create_train_state(
                Transformer(CONFIG, rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0)
            )
            layout = shardings(jax.eval_shape(create), self.mesh)
            start = jax.jit(create, out_shardings=layout)
            step = per_worker(make_train_step(next_token_loss, optimizer, axis_name="data"))
            self.programs[name, warmup] = start, jax.jit(step, donate_argnums=0)
        return self.programs[name, warmup]

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """Times of the steps in seconds, bytes that left this host in each, and bytes by formula."""
        start, step = self.program(order["optimizer"], order["warmup"])
        batch = shard_batch(self.batch, self.mesh)
        jax.block_until_ready(step(start(), batch))  # compiled, and all have met
        state = start()
        seconds, bytes_, formula = [], [], []
        for _ in range(order["steps"]):
            sent = int(COUNTER.read_text())
            began = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - began)
            bytes_.append(int(COUNTER.read_text()) - sent)
            formula.append(float(metrics["sent_bytes"]))
        size = sum(x.size for x in jax.tree.leaves(state.model))
        loss = float(metrics["loss"])
        return {
            "seconds": seconds,
            "bytes": bytes_,
            "formula": formula,
            "parameters": size,
            "loss": loss,
        }


def main() -> None:
    """Answers orders until there are no more."""
    initialize()
    with jax.numpy_dtype_promotion("standard"):
        trainer = Trainer()
        with jax.set_mesh(trainer.mesh):
            for line in sys.stdin:
                print(json.dumps(trainer.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
