"""The loss curve of a tiny GPT with experts on one mesh; imported by the tests and run in several processes."""

import json
import sys

import numpy as np

from effscale.models import MLPConfig, gpt2
from effscale.moe import MoEConfig, RouterConfig, with_experts
from effscale.parallel import Exchange, MeshConfig, initialize
from tests.training import gpt_curve

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
    """As that of ``gpt_curve``."""
    given = {"model": model(exchange or Exchange()), "batch": batch, "learning_rate": 1e-2}
    return gpt_curve.curve(config, devices, stop=stop, folder=folder, **given)


if __name__ == "__main__":
    initialize()
    given = json.loads(sys.argv[1])
    losses = curve(MeshConfig(**given), exchange=Exchange(host_devices=4))
    print(json.dumps({"losses": losses}), flush=True)
