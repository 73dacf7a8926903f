"""Two iterations of RLOO with rewards from a model and from the tokens, over all devices of all processes."""

import functools
import json

from effscale.parallel import MeshConfig, initialize, shard, shard_batch

initialize()

import dataclasses  # noqa: E402, after the processes have found each other

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from effscale.generation import SamplingConfig  # noqa: E402
from effscale.models import ClassHead, Transformer, gpt2  # noqa: E402
from effscale.rlhf import (  # noqa: E402
    GroupConfig,
    ModelReward,
    RolloutConfig,
    actor_loss,
    create_policy_state,
    make_policy_step,
)
from effscale.training import create_train_state, make_train_step  # noqa: E402

PROMPT = 4
mesh = MeshConfig().build()
tiny = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=32, max_length=10)
scored = dataclasses.replace(tiny, heads=(ClassHead(num_classes=1, name="score", pool="last"),))
make = lambda config: shard(Transformer(config, rngs=nnx.Rngs(0)), mesh)
config = GroupConfig(group_size=2, advantage="leave_one_out", kl_in="reward")
sampling = SamplingConfig(max_new_tokens=6, stop_token_ids=(1,))
optimizer = optax.adam(jnp.float32(1e-2))
prompts = np.random.default_rng(0).integers(2, 32, (4, PROMPT)).astype(np.int32)


def even(drawn, batch):
    """Read arrays on the host, as a function of a user does."""
    assert np.asarray(batch["input_ids"]).shape == (8, PROMPT)
    return (np.asarray(drawn.tokens)[:, PROMPT:] % 2 == 0).sum(1)


with jax.set_mesh(mesh):
    step = make_policy_step(
        make_train_step(functools.partial(actor_loss, config=config), optimizer),
        rewards={"even": even, "model": ModelReward(make(scored))},
        reference=make(tiny),
        rollout=RolloutConfig(sampling=sampling, mesh=mesh),
        config=config,
        minibatches=2,
    )
    actor = create_train_state(make(tiny), optimizer, key=jax.random.key(0))
    state = shard(create_policy_state(actor, key=jax.random.key(1), config=config), mesh)
    rows = np.array_split(prompts, jax.process_count())[jax.process_index()]
    batch = shard_batch({"input_ids": rows, "attention_mask": np.ones_like(rows, bool)}, mesh)
    for _ in range(2):
        state, metrics = step(state, batch)
names = ("score", "score_even", "score_model", "kl", "actor_loss")
print(json.dumps({name: float(metrics[name]) for name in names}))
