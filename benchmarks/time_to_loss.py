"""Time until a GPT reaches the final validation loss of transformers' Trainer, with and without random-LTD.

8 layers, width 128, 4 heads, rows of --length tokens of Python's standard library, batches of 2,048 tokens, float32,
AdamW, a cosine with a tenth of warmup, on the same batches in the same order. Every arm gets the same learning-rate search:
each of RATES over the whole budget, and more if the best is at the edge, with a separate seed (SEARCH_SEED).

Then transformers trains with SEEDS, and the mean of its final losses is the target. Each effscale arm runs with
shorter and shorter budgets, each with its own schedule, until the mean loss of the same seeds misses the target. The
last budget that reached it is confirmed with CONFIRMING seeds, on which it was not chosen: the table has their losses
and times. The arms take turns.

Times cover the loop from the end of the first step, with what feeds it, scaled to all steps; compilations and
evaluations are left out. Each run is saved in --folder, so that a benchmark that was stopped can resume.

    python benchmarks/time_to_loss.py --folder runs/time_to_loss
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

from harness import _machine, _versions, table

LAYERS, WIDTH, HEADS, VOCAB, BATCH_TOKENS = 8, 128, 4, 1024, 2048
RATES = (1e-3, 2e-3, 4e-3)
BUDGETS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4)
SEARCH_SEED, SEEDS, CONFIRMING = 1000, (0, 1, 2), (3, 4, 5)
ARMS = ("transformers", "plain", "random_ltd")


def corpus(folder: pathlib.Path, length: int):
    """Return training rows and held-out rows, of length + 1 tokens."""
    import numpy as np

    from effscale.data import StandardLibrary, prepare_corpus

    made = prepare_corpus(StandardLibrary(), folder / "corpus", vocab_size=VOCAB)

    def rows(store):
        count = (store.num_tokens - 1) // length
        starts = np.arange(count)[:, None] * length + np.arange(length + 1)
        return np.asarray(store.tokens)[starts].astype(np.int32)

    return rows(made.train), rows(made.validation)[: 32 * BATCH_TOKENS // length]


def batches(train, seed: int, steps: int):
    """Return the rows of each step."""
    import numpy as np

    length = train.shape[1] - 1
    batch = BATCH_TOKENS // length
    order = np.random.default_rng(seed).permutation(len(train))[: steps * batch]
    if len(order) < steps * batch:
        raise SystemExit(
            f"steps must be fewer: the corpus has only {len(train)} rows, got {steps} steps"
        )
    return train[order].reshape(steps, batch, length + 1)


def transformers(folder, length: int, rate: float, steps: int, seed: int) -> dict[str, float]:
    import torch
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from effscale.command.line import keep_freed_memory

    keep_freed_memory()  # the same for both
    train, held_out = corpus(folder, length)
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCAB, n_positions=length,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    # Rows are one token longer than the model reads: its loss shifts, so the model reads all but the last token and
    # predicts all but the first.
    rows = batches(train, seed, steps).reshape(-1, length + 1)
    as_item = lambda row: {
        "input_ids": torch.from_numpy(row[:-1]).long(),
        "labels": torch.from_numpy(row[1:]).long(),
    }

    def loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(input_ids=inputs["input_ids"])
        value = torch.nn.functional.cross_entropy(
            out.logits.flatten(0, 1), inputs["labels"].flatten()
        )
        return (value, out) if return_outputs else value

    class InOrder(Trainer):
        compute_loss = staticmethod(loss)

        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=BATCH_TOKENS // length, learning_rate=rate, adam_beta2=0.95, weight_decay=0.1,
        max_grad_norm=1.0, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_steps=steps // 10, optim="adamw_torch_fused", save_strategy="no", report_to=[],
        logging_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False, seed=seed,
    )  # fmt: skip
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    items = [as_item(row) for row in rows]
    InOrder(model=model, args=arguments, train_dataset=items, callbacks=[Clock()]).train()
    took = (ends[-1] - ends[0]) * steps / max(steps - 1, 1)
    model.eval()
    with torch.no_grad():
        losses = [
            float(loss(model, {k: torch.stack([as_item(r)[k] for r in held_out[i : i + 16]]) for k in ("input_ids", "labels")}))
            for i in range(0, len(held_out), 16)
        ]  # fmt: skip
    return {"loss": statistics.mean(losses), "seconds": took, "compile_seconds": 0.0}


def effscale(folder, length: int, arm: str, rate: float, steps: int, seed: int) -> dict[str, float]:
    import dataclasses

    import jax
    from flax import nnx

    from effscale.command.line import keep_freed_memory
    from effscale.data_efficiency import DataEfficiencyConfig, make_plan
    from effscale.models import Transformer, gpt2
    from effscale.training import (
        AdamWConfig,
        Clip,
        ScheduleConfig,
        StagedStep,
        create_train_state,
        evaluate,
        make_eval_step,
        make_train_step,
        next_token_loss,
    )

    keep_freed_memory()  # the same for both
    train, held_out = corpus(folder, length)
    config = gpt2(
        num_layers=LAYERS, d_model=WIDTH, num_heads=HEADS, vocab_size=VOCAB, max_length=length
    )
    config = dataclasses.replace(config, remat="dots")
    technique = "ltd" if arm == "random_ltd" else "none"
    plan = make_plan(
        technique, DataEfficiencyConfig(), config,
        steps=steps, batch_size=BATCH_TOKENS // length, length=length,
    )  # fmt: skip
    schedule = ScheduleConfig(
        peak=rate, warmup=plan.num_steps // 10, total=plan.num_steps, final=rate / 10
    )
    optimizer = AdamWConfig(b2=0.95, weight_decay=0.1).build(schedule.build())
    loss = next_token_loss if plan.ltd is None else plan.ltd.loss(next_token_loss)
    step = make_train_step(loss, optimizer, clip=Clip(1.0))
    create = lambda: create_train_state(
        Transformer(config, rngs=nnx.Rngs(seed)), optimizer, key=jax.random.key(seed)
    )
    state = jax.jit(create)()
    as_batch = lambda rows: {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}
    staged = StagedStep(step, plan.stages, plan.shape_batch)
    rows = batches(train, seed, plan.num_steps)
    began = time.perf_counter()
    for number in range(plan.num_steps):
        batch = staged.before_step(number, as_batch(rows[number]))
        state, metrics = staged(state, batch)
        jax.block_until_ready((state, metrics))
        if number == 0:  # compile all shapes before the clock starts
            staged.wait()
            compiling, began = time.perf_counter() - began, time.perf_counter()
    took = (time.perf_counter() - began) * plan.num_steps / max(plan.num_steps - 1, 1)
    batched = [as_batch(held_out[i : i + 16]) for i in range(0, len(held_out), 16)]
    found = evaluate(state.model, jax.jit(make_eval_step(next_token_loss)), batched)["loss"]
    return {"loss": found, "seconds": took, "compile_seconds": compiling}


def run(
    folder: pathlib.Path, length: int, arm: str, rate: float, steps: int, seed: int
) -> dict[str, float]:
    """Make a run in a separate process, or load its saved result."""
    file = folder / f"{arm}-{length}-{rate:g}-{steps}-{seed}.json"
    if not file.is_file():
        print(f"{arm}: rate {rate:g}, {steps} steps, seed {seed}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--folder", str(folder), "--length", str(length)]
        done = subprocess.run(
            [*command, "--run", arm, str(rate), str(steps), str(seed)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{arm} failed:\n{done.stderr[-3000:]}")
        file.write_text(done.stdout.strip().splitlines()[-1] + "\n")
    return json.loads(file.read_text())


def best_rate(folder: pathlib.Path, length: int, arm: str, steps: int) -> float:
    """Return the best of RATES; the range is extended as long as the best one is at its edge."""
    tried = list(RATES)
    while True:
        best = min(
            tried, key=lambda rate: run(folder, length, arm, rate, steps, SEARCH_SEED)["loss"]
        )
        if min(tried) < best < max(tried):
            return best
        tried.append(best * 2 if best == max(tried) else best / 2)


def compare(folder: pathlib.Path, length: int, steps: int) -> str:
    """Format the table."""
    rates = {arm: best_rate(folder, length, arm, steps) for arm in ARMS}
    mean = lambda runs, key="loss": statistics.mean(each[key] for each in runs)
    one = lambda arm, count, seed: run(folder, length, arm, rates[arm], count, seed)
    of = lambda arm, count: [one(arm, count, seed) for seed in SEEDS]
    goal = mean(of("transformers", steps))
    chosen, tried = {"transformers": 1.0}, {}
    for arm in ARMS[1:]:
        for budget in BUDGETS:
            tried[arm, budget] = mean(of(arm, round(budget * steps)))
            if tried[arm, budget] > goal:
                break
            chosen[arm] = budget
    confirming = {arm: [] for arm in chosen}
    for seed in CONFIRMING:
        for arm, budget in chosen.items():
            confirming[arm].append(one(arm, round(budget * steps), seed))
    rows = [["arm", "rate", "budget", "loss", "seconds", "compilation", "times as fast"]]
    for arm, runs in confirming.items():
        ratio = mean(confirming["transformers"], "seconds") / mean(runs, "seconds")
        times = [f"{mean(runs, key):.1f}" for key in ("seconds", "compile_seconds")]
        rows.append(
            [
                arm,
                f"{rates[arm]:g}",
                f"{chosen[arm]:g}",
                f"{mean(runs):.3f}",
                *times,
                f"{ratio:.2f}",
            ]
        )
    selection = [["arm", "budget", "loss"], ["transformers", "1", f"{goal:.3f}"]]
    selection += [[arm, f"{budget:g}", f"{loss:.3f}"] for (arm, budget), loss in tried.items()]
    head = (
        f"machine: {_machine()}; rows of {length} tokens, {steps} steps, {len(SEEDS)} seeds, means"
    )
    return "\n".join([head, "selection:", table(selection), "confirmation:", table(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=pathlib.Path, default="runs/time_to_loss", help="folder for saved runs"
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of transformers' run")
    parser.add_argument(
        "--length", type=int, default=256, help=f"tokens per row, a divisor of {BATCH_TOKENS}"
    )
    parser.add_argument("--run", nargs=4, metavar=("ARM", "RATE", "STEPS", "SEED"))
    parser.add_argument(
        "--rounds", type=int, default=1, help="for `make bench`; only 1 is supported"
    )
    parser.add_argument("--newest", help="for `make bench`; not used")
    args = parser.parse_args()
    if args.length < 1 or BATCH_TOKENS % args.length:
        parser.error(f"--length must divide {BATCH_TOKENS}, got {args.length}")
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.run:
        arm, rate, steps, seed = args.run
        given = (float(rate), int(steps), int(seed))
        found = (
            transformers(args.folder, args.length, *given)
            if arm == "transformers"
            else effscale(args.folder, args.length, arm, *given)
        )
        print(json.dumps({**found, **_versions()}))
    else:
        print(compare(args.folder, args.length, args.steps))


if __name__ == "__main__":
    main()
