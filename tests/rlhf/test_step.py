"""An iteration of PPO, GRPO and RLOO: phases, options, layouts, and what goes wrong."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.generation import SamplingConfig, decode
from effscale.generation.decoding import Generated
from effscale.models import ClassHead, Transformer, add_lora, gpt2, is_adapter, merge_lora
from effscale.parallel import MeshConfig, shard, shard_batch, to_host_memory
from effscale.quant import quantize_model, w8a8
from effscale.rlhf import (
    GroupConfig,
    ModelReward,
    PPOConfig,
    RolloutConfig,
    actor_loss,
    create_policy_state,
    critic_loss,
    from_text,
    make_policy_step,
    response_log_probs,
)
from effscale.rlhf.rollout import rollout_model
from effscale.rlhf.scores import total_score
from effscale.training import Checkpoints, create_train_state, fit, make_train_step, resume_or_start
from tests.parallel.local_launch import json_of_each

VOCAB, PROMPT, RESPONSE, ROWS = 32, 4, 6, 16
SAMPLING = SamplingConfig(
    max_new_tokens=RESPONSE, temperature=0.9, stop_token_ids=(1,), pad_token_id=0
)
ROLLOUT = RolloutConfig(sampling=SAMPLING)
PPO = PPOConfig(missing_end_penalty=0.5, kl_target=1.0, kl_horizon=100.0)


def prompts(seed=0, rows=ROWS):
    ids = np.random.default_rng(seed).integers(2, VOCAB, (rows, PROMPT)).astype(np.int32)
    mask = np.arange(PROMPT)[None] >= np.arange(rows)[:, None] % 3
    return {"input_ids": ids, "attention_mask": mask}


def make(heads=None, seed=0):
    config = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=VOCAB, max_length=10)
    config = dataclasses.replace(config, init_std=0.2, **({"heads": heads} if heads else {}))
    return jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(seed)))()


class Batches:
    """Batches of prompts, with a position that can be saved."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        return prompts(self.position - 1)

    def get_state(self):
        return self.position

    def set_state(self, state):
        self.position = state


def value_model():
    return make((ClassHead(num_classes=1, name="value", pool="none"),), seed=1)


def even(drawn, batch):
    answer = np.asarray(drawn.tokens)[:, PROMPT:]
    return ((answer % 2 == 0) & np.asarray(drawn.mask)[:, PROMPT:]).sum(1)


def learner(config, *, actor=None, trainable=None, optimizer=None, mesh=None, **options):
    """A step, and a function that makes the state it begins with."""
    optimizer = optax.adam(jnp.float32(3e-3)) if optimizer is None else optimizer
    loss = functools.partial(actor_loss, config=config, temperature=SAMPLING.temperature)
    steps = [make_train_step(loss, optimizer, trainable=trainable)]
    if isinstance(config, PPOConfig):
        steps.append(make_train_step(functools.partial(critic_loss, config=config), optimizer))
    placed = (lambda model: model) if mesh is None else functools.partial(shard, mesh=mesh)
    options = {"rewards": even, "rollout": ROLLOUT, "reference": placed(make())} | options

    def create():
        keys = {"key": jax.random.key(0)}
        models = [make() if actor is None else jax.tree.map(jnp.copy, actor)]
        first = create_train_state(placed(models[0]), optimizer, **keys, trainable=trainable)
        states = [first]
        if isinstance(config, PPOConfig):
            states.append(create_train_state(placed(value_model()), optimizer, **keys))
        return create_policy_state(*states, key=jax.random.key(1), config=config)

    return make_policy_step(*steps, config=config, **options), create


CONFIGS = {
    "ppo": PPO,
    "grpo": GroupConfig(group_size=4),
    "rloo": GroupConfig(group_size=4, advantage="leave_one_out", kl_in="reward", kl_estimator="k1"),
}


@pytest.fixture(scope="module")
def made():
    """A step for each config, compiled once for all tests."""
    return {name: learner(config, epochs=2, minibatches=2) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_score_rises(made, name):
    step, create = made[name]
    state, found = create(), []
    for number in range(8):
        state, metrics = step(state, prompts(number))
        found.append(float(metrics["score"]))
    assert np.mean(found[-3:]) > np.mean(found[:2]) + 0.5
    assert (int(state.step), int(state.actor.step)) == (8, 32)
    assert metrics["kl"] > 0
    assert 0 < metrics["actor_entropy"] < np.log(VOCAB)
    phases = {"switch_seconds", "generate_seconds", "score_seconds", "update_seconds"}
    assert phases <= set(metrics)
    if name == "ppo":
        assert metrics["critic_explained_variance"] <= 1


@pytest.mark.parametrize("temperature", [SAMPLING.temperature, 0.0])
def test_the_first_update_begins_at_the_policy_that_drew(temperature):
    """Greedy drawing tells log-probabilities at temperature 1, and so does what reads them again."""
    sampling = dataclasses.replace(SAMPLING, temperature=temperature)
    config = dataclasses.replace(PPO, kl_target=None)
    step, create = learner(config, rollout=RolloutConfig(sampling=sampling))
    _, metrics = step(create(), prompts())
    np.testing.assert_allclose(metrics["kl"], 0, atol=1e-4)
    if temperature:
        np.testing.assert_allclose(metrics["actor_ratio"], 1, atol=1e-5)
        np.testing.assert_allclose(metrics["actor_clip_fraction"], 0)


def test_the_price_of_divergence_follows_its_target(made):
    """At first there is none, and it becomes cheaper by as much as one batch may change it."""
    step, create = made["ppo"]
    state, metrics = step(create(), prompts())
    assert float(metrics["kl_coef"]) == np.float32(PPO.kl_coef)
    np.testing.assert_allclose(state.kl_coef, 0.05 * (1 - 0.2 * ROWS / 100), rtol=1e-6)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(made, tmp_path):
    step, create = made["ppo"]
    whole = fit(create(), step, Batches(), num_steps=4)
    with Checkpoints(tmp_path, every=2) as checkpoints:
        fit(create(), step, Batches(), num_steps=2, checkpoints=checkpoints)
    with Checkpoints(tmp_path, every=2) as checkpoints:
        data = Batches()
        state, start = resume_or_start(checkpoints, create, data)
        assert start == 2
        resumed = fit(state, step, data, num_steps=4)
    for a, b in zip(*(jax.tree.leaves(r.state.actor.model) for r in (whole, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert whole.history[2]["score"] == resumed.history[0]["score"]


def test_models_in_host_memory_are_the_same(made):
    score = make((ClassHead(num_classes=1, name="score", pool="last"),), seed=2)
    batch = {name: jnp.asarray(rows) for name, rows in prompts().items()}
    given = {"attention_mask": batch["attention_mask"], "key": jax.random.key(0)}
    drawn = decode(make(), batch["input_ids"], SAMPLING, **given)
    scores = [ModelReward(model)(drawn, batch) for model in (score, to_host_memory(score))]
    np.testing.assert_array_equal(*scores)
    step, create = made["ppo"]
    waiting, _ = learner(PPO, epochs=2, minibatches=2, reference=to_host_memory(make()))
    (_, a), (_, b) = (one(create(), prompts()) for one in (step, waiting))
    for metric in ("kl", "actor_loss"):
        assert float(a[metric]) == float(b[metric])


def test_eight_devices_draw_and_learn_what_one_does(made):
    """Trained over ``fsdp`` and ``tensor``, drawn with whole weights along ``fsdp``."""
    mesh = MeshConfig(fsdp=4, tensor=2).build()
    alone, create = made["ppo"]
    _, expected = alone(create(), prompts())
    rollout = RolloutConfig(sampling=SAMPLING, mesh=mesh)
    step, create = learner(PPO, epochs=2, minibatches=2, mesh=mesh, rollout=rollout)
    with jax.set_mesh(mesh):
        state = create()
        kernel = lambda model: model.groups[0].blocks[0].feed_forward.up.kernel.get_value()
        assert "fsdp" in str(kernel(state.actor.model).sharding.spec)
        drawing = kernel(rollout_model(state.actor.model, rollout)).sharding.spec
        assert "fsdp" not in str(drawing)
        assert "tensor" in str(drawing)
        state, metrics = step(state, shard_batch(prompts(), mesh))
        assert "fsdp" in str(kernel(state.actor.model).sharding.spec)
    for name in ("score", "kl", "length", "actor_loss", "critic_loss"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-3, atol=1e-5)


def test_a_low_rank_actor_learns_and_its_base_stays():
    actor = add_lora(make(), rank=2, key=jax.random.key(3))
    step, create = learner(PPO, actor=actor, trainable=is_adapter)
    state, _ = step(create(), prompts())
    before, after = actor, state.actor.model
    weight = lambda model: model.groups[0].blocks[0].feed_forward.up.kernel.get_value()
    np.testing.assert_array_equal(weight(after).base, weight(before).base)
    assert not np.array_equal(weight(after).b, weight(before).b)
    tokens = jnp.asarray(prompts()["input_ids"])
    model = rollout_model(after, ROLLOUT)
    expected = merge_lora(after)(tokens)
    np.testing.assert_allclose(model(tokens), expected, atol=1e-5)


def test_responses_may_be_drawn_with_weights_of_8_bits():
    """They are told with the log-probabilities of the model that drew them; what learns stays in full precision."""
    quantized = dataclasses.replace(ROLLOUT, prepare=lambda model: quantize_model(model, w8a8()))
    step, create = learner(dataclasses.replace(PPO, kl_target=None), rollout=quantized)
    model = rollout_model(make(), quantized)
    assert sum(x.dtype == jnp.int8 for x in jax.tree.leaves(model)) == 6  # of one layer
    batch = {name: jnp.asarray(rows) for name, rows in prompts().items()}
    drawn = decode(
        *(model, batch["input_ids"], SAMPLING),
        attention_mask=batch["attention_mask"],
        key=jax.random.key(0),
        log_probs=True,
    )
    given = drawn.tokens, drawn.mask, RESPONSE
    said, exact = (
        response_log_probs(m, *given, temperature=SAMPLING.temperature).log_probs
        for m in (model, make())
    )
    real = drawn.mask[:, PROMPT:]
    off = lambda a: float(jnp.abs(jnp.where(real, a - drawn.log_probs, 0)).max())
    assert off(said) < 1e-4
    assert 1e-4 < off(exact) < 0.2
    state, metrics = step(create(), prompts())
    assert all(x.dtype != jnp.int8 for x in jax.tree.leaves(state.actor.model))
    assert 0 < abs(float(metrics["actor_ratio"]) - 1) < 0.02


def test_nothing_of_generation_is_kept(made):
    """Neither the actor's second layout nor the cache: what lives after a step is what lived before it."""
    step, create = made["ppo"]
    state, _ = step(create(), prompts())
    state, _ = step(state, prompts())
    size = lambda: sum(array.nbytes for array in jax.live_arrays())
    before = size()
    state, _ = step(state, prompts())
    assert size() <= before


def test_ordinary_text_is_mixed_in():
    """The gradient is that of the sum."""
    text = {"input_ids": prompts(7)["input_ids"], "labels": prompts(8)["input_ids"]}
    step, create = learner(dataclasses.replace(PPO, pretraining_coef=2.0))
    batch = prompts() | {"text": jax.tree.map(jnp.asarray, text)}
    _, metrics = step(create(), batch)
    plain, create_plain = learner(PPO)
    _, without = plain(create_plain(), prompts())
    total = without["actor_loss"] + 2.0 * metrics["actor_text_loss"]
    np.testing.assert_allclose(metrics["actor_loss"], total, rtol=1e-5)
    with pytest.raises(ValueError, match=r"pretraining_coef=2\.0 needs rows of text"):
        step(create(), prompts())
    fewer = prompts() | {"text": jax.tree.map(lambda a: a[:8], text)}
    with pytest.raises(
        ValueError, match=r"text\['input_ids'\] must have one row per response, .*, got 8"
    ):
        step(create(), fewer)


def test_a_group_answers_one_prompt():
    """Responses to one prompt stand side by side, and so does what rewards read."""
    seen = {}

    def reward(drawn, batch):
        seen.update(tokens=np.asarray(drawn.tokens), number=batch["number"], name=batch["name"])
        return even(drawn, batch)

    step, create = learner(GroupConfig(group_size=3), rewards=reward)
    numbers = np.arange(4)
    step(create(), prompts(rows=4) | {"number": numbers, "name": ["a", "b", "c", "d"]})
    expected = np.repeat(prompts(rows=4)["input_ids"], 3, axis=0)
    real = np.repeat(prompts(rows=4)["attention_mask"], 3, axis=0)
    np.testing.assert_array_equal(
        np.where(real, seen["tokens"][:, :PROMPT], -1), np.where(real, expected, -1)
    )
    assert seen["number"].tolist() == np.repeat(numbers, 3).tolist()
    assert "".join(seen["name"]) == "aaabbbcccddd"


def test_rewards_are_summed_by_name():
    from effscale.data import train_tokenizer

    tokenizer = train_tokenizer(["a b c"], vocab_size=270)
    fields = {}

    def length(prompts, responses, *, wanted):
        fields.update(prompts=prompts, wanted=wanted)
        return [float(len(r)) for r in responses]

    prompt, answer = tokenizer.encode("a b").ids, tokenizer.encode("ab cd").ids[:3]
    tokens = jnp.asarray([prompt + answer] * 2, jnp.int32)
    mask = jnp.ones_like(tokens, bool).at[1, -1].set(False)
    drawn = Generated(tokens, mask, mask[:, -3:].sum(1), jnp.zeros(2, bool))
    cut = slice(None, len(prompt))
    batch = {"input_ids": tokens[:, cut], "attention_mask": mask[:, cut], "wanted": [1, 2]}
    rewards = {"length": from_text(tokenizer, length), "one": lambda drawn, batch: [1.0, 2.0]}
    scores, metrics = total_score(rewards, drawn, batch, {"one": 10.0})
    lengths = [len(tokenizer.decode(answer[:n])) for n in (3, 2)]
    np.testing.assert_allclose(scores, np.add(lengths, [10, 20]))
    assert fields == {"prompts": ["a b"] * 2, "wanted": [1, 2]}
    assert metrics == {"score_length": np.mean(lengths), "score_one": 1.5}
    # A function that names no field is given none, and one that names some those.
    plain = from_text(tokenizer, lambda prompts, responses: [len(r) for r in responses])
    assert list(plain(drawn, batch)) == lengths
    wanting = from_text(tokenizer, lambda prompts, responses, wanted: wanted)
    assert wanting(drawn, batch) == [1, 2]
    # Python does not tell what max names.
    assert from_text(tokenizer, max)(drawn, batch) == max(
        ["a b"] * 2, [tokenizer.decode(answer[:n]) for n in (3, 2)]
    )


def test_bad_input(made):
    _, create = made["ppo"]
    for reward, message in (
        (
            lambda drawn, batch: [float("nan")] * ROWS,
            "the reward must be finite, got nan for response 0",
        ),
        (
            lambda drawn, batch: np.full(ROWS, 1j),
            "the reward must return real numbers, got the dtype complex128",
        ),
        (
            lambda drawn, batch: [1.0],
            r"the reward must return one number for each of the .* got the shape \(1,\)",
        ),
    ):
        broken, create = learner(PPO, rewards=reward)
        with pytest.raises(ValueError, match=message):
            broken(create(), prompts())
    with pytest.raises(ValueError, match=r"weights must have names of rewards, .* got \['x'\]"):
        learner(PPO, weights={"x": 1.0})[0](create(), prompts())
    with pytest.raises(
        ValueError, match=r"minibatches must divide the number of responses, .* got 3"
    ):
        learner(PPO, minibatches=3)[0](create(), prompts())
    right = np.ones((ROWS, PROMPT), bool)
    right[0, -1] = False
    with pytest.raises(ValueError, match=r"last column\. Pad prompts on the left"):
        learner(PPO)[0](create(), {**prompts(), "attention_mask": right})
    with pytest.raises(ValueError, match="the batch of prompts needs attention_mask"):
        learner(PPO)[0](create(), {"input_ids": prompts()["input_ids"]})
    shared = create()
    with pytest.raises(ValueError, match="the reference shares arrays with the actor"):
        learner(PPO, reference=shared.actor.model)[0](shared, prompts())
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        learner(PPO, epochs=0)
    with pytest.raises(ValueError, match="critic_step must be set for a PPOConfig"):
        make_policy_step(
            lambda state, batch: None, rewards=even, reference=make(), rollout=ROLLOUT, config=PPO
        )
    with pytest.raises(ValueError, match="group_size"):
        GroupConfig(group_size=1)


def test_two_processes_learn_what_one_does():
    """Rewards read arrays that no process holds whole."""
    run = lambda n: json_of_each("tests.rlhf.processes_step", processes=n, devices=2 // n)
    (alone,) = run(1)
    for other in run(2):
        assert other == pytest.approx(alone, rel=1e-4)
