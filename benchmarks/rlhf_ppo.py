"""An iteration of PPO (generate, score, learn), compared with TRL 1.12, the last release that includes PPO.

Four GPT-2s with 6 layers, width 256, a vocabulary of 8,192, float32 and random weights: actor, reference model,
critic and reward model. 8 prompts of 32 tokens, 64 new tokens each, one minibatch; 4 epochs and 1. TRL runs with
``gc.freeze()`` before training, which makes it faster.

Both do the same work: one generation; one pass of reference model, critic and reward model; and for each epoch a
forward and backward pass of actor and critic with AdamW. TRL uses one optimizer for both. effscale runs with
``keep_freed_memory``, as in the experiments. Install TRL in addition: ``pip install --editable ".[cli]" --group trl``.
"""

import gc
import itertools
import statistics
import time

import harness

PROMPTS, PROMPT, NEW, VOCAB = 8, 32, 64, 8192
SHAPE = {"num_layers": 6, "d_model": 256, "num_heads": 4, "vocab_size": VOCAB, "max_length": 128}
ITERATIONS = 7
PHASES = ("switch", "generate", "score", "update")


def effscale(epochs: int) -> dict[str, float]:
    import dataclasses
    import functools

    import jax
    import numpy as np
    import optax
    from flax import nnx

    from effscale.command.line import keep_freed_memory
    from effscale.generation import SamplingConfig
    from effscale.models import ClassHead, Transformer, gpt2
    from effscale.rlhf import (
        ModelReward,
        PPOConfig,
        RolloutConfig,
        actor_loss,
        create_policy_state,
        critic_loss,
        make_policy_step,
    )
    from effscale.training import create_train_state, make_train_step

    keep_freed_memory()
    # Layers are partly recomputed: on a CPU this is faster than storing their activations.
    config = dataclasses.replace(gpt2(**SHAPE), remat="dots")
    scalar = ClassHead(num_classes=1, name="value", pool="none")
    scored = dataclasses.replace(config, heads=(scalar,))
    make = lambda config, seed: jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(seed)))()
    optimizer = optax.adamw(3e-6, weight_decay=0.0)
    ppo = PPOConfig(score_at="next")
    states = [
        create_train_state(make(c, seed), optimizer, key=jax.random.key(0))
        for seed, c in enumerate((config, scored))
    ]
    step = make_policy_step(
        make_train_step(functools.partial(actor_loss, config=ppo), optimizer),
        make_train_step(functools.partial(critic_loss, config=ppo), optimizer),
        rewards=ModelReward(make(scored, 2), head="value"),
        reference=make(config, 0),
        rollout=RolloutConfig(sampling=SamplingConfig(max_new_tokens=NEW)),
        config=ppo,
        epochs=epochs,
    )
    state = create_policy_state(*states, key=jax.random.key(1), config=ppo)
    rng = np.random.default_rng(0)
    seconds, processor, phases = [], [], {name: [] for name in PHASES}
    for number in range(ITERATIONS + 2):
        ids = rng.integers(0, VOCAB, (PROMPTS, PROMPT)).astype(np.int32)
        batch = {"input_ids": ids, "attention_mask": np.ones(ids.shape, bool)}
        began, used = time.perf_counter(), time.process_time()
        state, metrics = step(state, batch)
        float(metrics["actor_loss"])
        if number >= 2:
            seconds.append(time.perf_counter() - began)
            processor.append(time.process_time() - used)
            for name in PHASES:
                phases[name].append(metrics[f"{name}_seconds"])
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(processor),
        **{name: statistics.median(times) for name, times in phases.items()},
    }


def trl(epochs: int) -> dict[str, float]:
    import os

    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import tempfile

    import numpy as np
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.manual_seed(0)
    words = {f"w{i}": i for i in range(VOCAB - 2)} | {"<eos>": VOCAB - 2, "<pad>": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "padding_side": "left"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    def shape(**more):
        special = {"bos_token_id": VOCAB - 2, "eos_token_id": VOCAB - 2, "pad_token_id": VOCAB - 1}
        return GPT2Config(
            vocab_size=VOCAB, n_positions=128, n_embd=256, n_layer=6, n_head=4, **special, **more
        )

    actor, reference = GPT2LMHeadModel(shape()), GPT2LMHeadModel(shape())
    reference.load_state_dict(actor.state_dict())
    reward, critic = (GPT2ForSequenceClassification(shape(num_labels=1)) for _ in range(2))
    ids = np.random.default_rng(0).integers(0, VOCAB - 2, (PROMPTS * 32, PROMPT)).tolist()
    marks: list[tuple[float, float]] = []

    class Mark(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            marks.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
            per_device_train_batch_size=PROMPTS,
            gradient_accumulation_steps=1,
            num_ppo_epochs=epochs,
            num_mini_batches=1,
            response_length=NEW,
            total_episodes=PROMPTS * (ITERATIONS + 2),
            temperature=1.0,
            num_sample_generations=0,
            logging_steps=10**6,
        )
        trainer = PPOTrainer(
            *(
                arguments,
                tokenizer,
                actor,
                reference,
                reward,
                Dataset.from_dict({"input_ids": ids}),
            ),
            critic,
            callbacks=[Mark()],
        )
        trainer.log = lambda *args, **kwargs: None
        gc.collect()
        gc.freeze()
        trainer.train()
    steps = list(itertools.pairwise(marks[1:]))
    return {
        "seconds": statistics.median(b[0] - a[0] for a, b in steps),
        "cpu_seconds": statistics.median(b[1] - a[1] for a, b in steps),
    }


def report(medians: dict[str, dict[str, float]]) -> str:
    rows = [["program, epochs", "seconds", "CPU s", "TRL / ours", *PHASES]]
    for epochs in (4, 1):
        peer = medians[f"trl, {epochs}"]["seconds"]
        for name in (f"effscale, {epochs}", f"effscale, {epochs}@newest", f"trl, {epochs}"):
            if name not in medians:
                continue
            found = medians[name]
            shares = [
                f"{100 * found[phase] / found['seconds']:.1f} %" if phase in found else ""
                for phase in PHASES
            ]
            ratio = f"{peer / found['seconds']:.2f}"
            times = f"{found['seconds']:.3f}", f"{found['cpu_seconds']:.3f}"
            rows.append([name, *times, ratio, *shares])
    return harness.table(rows)


def worker(function, epochs):
    return lambda: function(epochs)


if __name__ == "__main__":
    harness.main(
        {
            f"{name}, {epochs}{suffix}": worker(function, epochs)
            for epochs in (4, 1)
            for name, function, suffix in (
                ("effscale", effscale, ""),
                ("trl", trl, ""),
                ("effscale", effscale, "@newest"),
            )
        },
        rounds=3,
        report=report,
    )
