"""States that are no ``TrainState``: two models with an optimizer each and a phase, saved and resumed like any other."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effscale.training import (
    CheckpointError,
    Checkpoints,
    JsonlWriter,
    Loss,
    TrainState,
    abstract,
    create_train_state,
    fit,
    make_train_step,
    restore_model,
    resume_or_start,
)
from effscale.training.items import items_of, state_of
from effscale.training.state import ema_model

WARMUP = 3  # steps of the phase in which the critic learns alone
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActorCritic:
    actor: TrainState
    critic: TrainState
    phase: Any
    step: Any

    @property
    def skipped_in_row(self):
        return jnp.maximum(self.actor.skipped_in_row, self.critic.skipped_in_row)


def policy_loss(actor, batch, key, frozen):
    """The policy gradient, with a penalty for leaving the reference."""
    logits, reference = batch["x"] @ actor["w"], batch["x"] @ frozen["reference"]["w"]
    new, old = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    taken = jnp.take_along_axis(new, batch["actions"][:, None], 1)[:, 0]
    divergence = (jnp.exp(new) * (new - old)).sum(-1)
    total = (batch["kl"] * divergence - batch["advantages"] * taken).sum()
    return Loss(total, divergence.size, {"policy": jnp.exp(new).sum(0), "kl": divergence.sum()})


def value_loss(critic, batch, key):
    return Loss(((batch["x"] @ critic["v"] - batch["rewards"]) ** 2).sum(), batch["x"].shape[0])


@jax.jit
def roll_out(state, batch, frozen):
    key = jax.random.fold_in(state.actor.key, state.step)
    actions = jax.random.categorical(key, batch["x"] @ state.actor.model["w"])
    rewards = jnp.take_along_axis(batch["x"] @ frozen["reward"], actions[:, None], 1)[:, 0]
    advantages = rewards - batch["x"] @ state.critic.model["v"]
    return batch | {"actions": actions, "rewards": rewards, "advantages": advantages}


learn_policy = jax.jit(
    make_train_step(policy_loss, OPTIMIZER, ema_decay=0.9, accumulate=2), donate_argnums=0
)
learn_values = jax.jit(make_train_step(value_loss, OPTIMIZER), donate_argnums=0)


def iteration(state, batch, frozen):
    """What an RLHF loop does: a rollout, then epochs on it; the actor joins after the critic's warm-up."""
    rollout, metrics = roll_out(state, batch, frozen), {}
    critic, values = learn_values(
        state.critic, {name: rollout[name] for name in ("x", "rewards", "kl")}
    )
    metrics |= {"value_loss": values["loss"]}
    actor = state.actor
    if int(state.phase) == 1:
        for _ in range(2):
            actor, policy = learn_policy(actor, rollout, frozen=frozen)
        metrics |= {"kl": policy["kl"], "policy": policy["policy"]}
    step = state.step + 1
    return ActorCritic(actor, critic, (step >= WARMUP).astype(jnp.int32), step), metrics


def fresh():
    keys = jax.random.split(jax.random.key(0), 3)
    make = lambda weights, key, **options: create_train_state(
        weights, OPTIMIZER, key=key, **options
    )
    return ActorCritic(
        actor=make({"w": jax.random.normal(keys[0], (3, 4))}, keys[1], ema=True),
        critic=make({"v": jnp.zeros(3)}, keys[2]),
        phase=jnp.int32(0),
        step=jnp.int32(0),
    )


class Prompts:
    """Drawn by their number; one of them stands for a kill."""

    def __init__(self, kill_at=None):
        self.position, self.kill_at = 0, kill_at

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == self.kill_at:
            raise KeyError("killed")
        self.position += 1
        x = np.random.default_rng(self.position).normal(size=(8, 3)).astype(np.float32)
        return {"x": x, "kl": np.float32(0.1)}

    def get_state(self):
        return self.position

    def set_state(self, state):
        self.position = state


def content(tree):
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(plain(x)) for x in jax.tree.leaves(tree)]


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, content(a), content(b))


@pytest.fixture(scope="module")
def frozen():
    random = np.random.default_rng(7)
    draw = lambda: jnp.asarray(random.normal(size=(3, 4)), jnp.float32)
    return {"reference": {"w": draw()}, "reward": draw()}


def run(folder, frozen, kill_at=None):
    data = Prompts(kill_at)
    with Checkpoints(folder / "checkpoints", every=2, keep=2) as checkpoints:
        state, start = resume_or_start(checkpoints, fresh, data)
        writer = JsonlWriter(folder / "metrics.jsonl", resume_step=start)
        options = {"frozen": frozen, "checkpoints": checkpoints, "writer": writer}
        try:
            return start, fit(state, iteration, data, num_steps=7, **options).state
        finally:
            writer.close()


def test_a_run_of_two_models_with_phases_resumes_exactly(tmp_path, frozen):
    _, whole = run(tmp_path / "whole", frozen)
    for kill_at in (2, 5):  # before the second phase, and in it
        with pytest.raises(KeyError, match="killed"):
            run(tmp_path / "killed", frozen, kill_at)
    start, resumed = run(tmp_path / "killed", frozen)
    assert (start, int(whole.phase), int(whole.step), int(whole.actor.step)) == (4, 1, 7, 8)
    equal(resumed, whole)
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert metrics[0] == metrics[1]
    records = [json.loads(line) for line in metrics[0].splitlines()]
    assert ["policy" in record for record in records] == [False] * 3 + [True] * 4
    np.testing.assert_allclose(sum(records[-1]["policy"]), 1.0, rtol=1e-5)

    # Each model can be read alone, the actor's average as well.
    folder = tmp_path / "whole"
    critic, step = restore_model(folder, abstract(whole.critic.model), item="critic.model")
    assert step == 7
    equal(critic, whole.critic.model)
    average, _ = restore_model(folder, abstract(whole.actor.model), item="actor.model", ema=True)
    equal(average, ema_model(whole.actor))
    with pytest.raises(CheckpointError, match=r"no 'model' \(only actor\.ema, actor\.model"):
        restore_model(folder, abstract(whole.actor.model))


def test_what_was_saved_amid_skipped_updates_is_told_by_the_state(tmp_path):
    state = fresh()
    skipping = dataclasses.replace(state.critic, skipped_in_row=jnp.int32(2))
    with Checkpoints(tmp_path, every=1, keep=1) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.save(2, dataclasses.replace(state, critic=skipping))
    assert (checkpoints.steps, checkpoints.last_good) == ([1, 2], 1)


def test_a_dict_is_a_state_of_a_loop_of_ones_own(tmp_path):
    create = lambda: {"net": {"w": jnp.ones(3)}, "none": None, "count": jnp.int32(4)}
    state, start = resume_or_start(Checkpoints(tmp_path), create)
    assert start == 0
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state | {"net": {"w": jnp.full(3, 2.0)}}, force=True)
    state, start = resume_or_start(Checkpoints(tmp_path), create)
    assert (start, state["net"]["w"].tolist(), int(state["count"])) == (1, [2.0] * 3, 4)
    assert state["none"] is None
    other = {"net": {"w": jnp.ones(3)}, "count": {"of": jnp.int32(4)}}
    with pytest.raises(CheckpointError, match=r"a different model.*has no 'count'"):
        Checkpoints(tmp_path).restore(other)


def test_items_are_the_fields_by_name():
    state = fresh()
    items = items_of(state)
    actor = ["actor.ema", "actor.model", "actor.train"]
    assert sorted(items) == [*actor, "arrays", "critic.model", "critic.train"]
    assert len(jax.tree.leaves(items)) == len(jax.tree.leaves(state))
    equal(state_of(state, items), state)
    # On disk a TrainState has these, and its older checkpoints are read by them.
    assert list(items_of(state.actor)) == ["model", "train", "ema"]
    assert items["actor.train"].model is items["actor.train"].ema is None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"run": {"w": jnp.ones(2)}}, "name 'run'"),
        ({"a/b": {"w": jnp.ones(2)}}, "name 'a/b'"),
        (
            {"arrays": {"w": jnp.ones(2)}, "step": jnp.int32(0)},
            "under the same name .arrays, arrays",
        ),
    ],
)
def test_names_that_a_checkpoint_cannot_have(tmp_path, state, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path).save(1, state, force=True)
