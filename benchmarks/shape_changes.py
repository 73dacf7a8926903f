"""Whether a step has to wait when a curriculum or token dropping changes shapes.

A GPT-2 (6 layers, width 256, 4 heads, vocabulary 8192, batches of 8 rows) is trained while its rows grow from 128 to
256 tokens and the number of tokens that its middle layers keep grows from 64 to all, in five shapes of 49 to 100
steps. The first step of each shape is compared with the median of the shape. ``waiting`` is the same run with all
shapes compiled before its second step, as in the experiments: what remains is the cost of a program's first run.
``jit`` compiles when a shape first occurs.
"""

import statistics
import sys
import time

from harness import main

from effscale.training import Clip

LAYERS, WIDTH, HEADS, VOCAB, BATCH, LENGTH, STEPS = 6, 256, 4, 8192, 8, 256, 100


def run(background: bool, wait: bool = False) -> dict[str, float]:
    import dataclasses

    import jax
    import numpy as np
    from flax import nnx

    from effscale.command.line import keep_freed_memory
    from effscale.curriculum import SequenceLengthCurriculum
    from effscale.ltd import RandomLTD, mslg
    from effscale.models import Transformer, gpt2
    from effscale.training import (
        AdamWConfig,
        LinearPacing,
        StagedStep,
        create_train_state,
        make_train_step,
        merge,
        next_token_loss,
    )

    keep_freed_memory()  # as every experiment does
    pacing = LinearPacing(
        min_difficulty=128, max_difficulty=LENGTH, total=3 * STEPS // 2, difficulty_step=128
    )
    curriculum = SequenceLengthCurriculum(pacing=pacing)
    ltd = RandomLTD(
        pacing=mslg(min_value=64, max_value=LENGTH, require_steps=3 * STEPS, seq_per_step=64)
    )

    def shape_batch(batch, value):
        length, kept = value
        return ltd.shape_batch(curriculum.shape_batch(batch, length), kept)

    stages = merge(curriculum.stages(BATCH), ltd.stages(BATCH))
    config = gpt2(
        num_layers=LAYERS, d_model=WIDTH, num_heads=HEADS, vocab_size=VOCAB, max_length=LENGTH
    )
    model = Transformer(dataclasses.replace(config, remat="dots"), rngs=nnx.Rngs(0))
    optimizer = AdamWConfig().build(1e-3)
    state = create_train_state(model, optimizer, key=jax.random.key(0))
    step = make_train_step(ltd.loss(next_token_loss), optimizer, clip=Clip(1.0))
    staged = StagedStep(step, stages, shape_batch)
    jitted = jax.jit(step, donate_argnums=0)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    whole = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}

    times: dict[int, list[float]] = {}
    for number in range(stages.starts[-1] + STEPS):
        began = time.perf_counter()
        batch = staged.before_step(number, whole)
        state, metrics = (staged if background else jitted)(state, batch)
        jax.block_until_ready((state, metrics))
        times.setdefault(stages.index(number), []).append(time.perf_counter() - began)
        if wait and number == 0:
            staged.wait()
    ratios = [took[0] / statistics.median(took) for stage, took in times.items() if stage > 0]
    compiled = staged.num_compilations if background else jitted._cache_size()
    print("first steps over medians:", [f"{ratio:.2f}" for ratio in ratios], file=sys.stderr)
    return {
        "greatest_first_over_median": max(ratios),
        "median_first_over_median": statistics.median(ratios),
        "stages": len(stages.values),
        "compilations": compiled,
        "seconds": sum(map(sum, times.values())),
    }


def report(medians: dict[str, dict[str, float]]) -> str:
    return "\n".join(
        f"{name}: the first step of a shape takes up to {values['greatest_first_over_median']:.2f} x the median of its shape; "
        f"{values['compilations']:.0f} compilations for {values['stages']:.0f} stages"
        for name, values in medians.items()
    )


if __name__ == "__main__":
    workers = {
        "staged": lambda: run(True),
        "waiting": lambda: run(True, wait=True),
        "jit": lambda: run(False),
        "staged@newest": lambda: run(True),
    }
    main(workers, rounds=2, report=report)
