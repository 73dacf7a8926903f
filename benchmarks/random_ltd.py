"""A training step with random-LTD: the time saved, compared with the operations saved.

8 layers, width 256, 4 heads, S = 512, batches of 8 rows, float32, AdamW; the 6 middle layers keep r tokens. `layers`
is the forward and backward pass up to the last norm; `step` is a whole training step with a vocabulary of 512 and
AdamW. All values of r take turns in one process.

`schedule` is the papers' GPT recipe, scaled down: from a sixteenth of the tokens to all of them after 0.7 of 1,000
steps. It uses the median step of each r, and the saving is relative to 1,000 steps without dropping. `gather` is the
overhead of dropping layers without the layers themselves: draw positions, gather tokens and put them back in six
layers, forward and backward.
"""

import statistics
import time

from harness import main, seconds, table

from effscale.training import Clip

LAYERS, WIDTH, HEADS, VOCAB, BATCH, LENGTH = 8, 256, 4, 512, 8, 512
KEPT = (512, 128, 256, 384)
SCHEDULE, STEPS = (512, 32, 64, 128, 192, 256, 320, 384, 448), 1000
REPEATS = 9


def setup():
    import jax
    import numpy as np
    from flax import nnx

    from effscale.command.line import keep_freed_memory
    from effscale.models import Transformer, gpt2

    keep_freed_memory()  # as every experiment does
    config = gpt2(
        num_layers=LAYERS, d_model=WIDTH, num_heads=HEADS, vocab_size=VOCAB, max_length=LENGTH
    )
    model = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    ids = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    return model, {"input_ids": jax.numpy.asarray(ids[:, :-1]), "labels": ids[:, 1:]}


def recipe():
    """Return the schedule; SCHEDULE lists its values."""
    from effscale.ltd import mslg

    return mslg(
        min_value=LENGTH // 16, max_value=LENGTH, require_steps=round(0.7 * STEPS), seq_per_step=64
    )


def in_turn(functions: dict) -> dict[str, float]:
    """Return the median milliseconds of each function; functions take turns."""
    times: dict = {name: [] for name in functions}
    for round_ in range(REPEATS + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if round_:  # the first call compiles
                times[name].append(time.perf_counter() - began)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def layers() -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from effscale.ltd import token_dropping

    model, batch = setup()

    def gradient(kept):
        def loss(model, ids, key):
            runner = token_dropping(model.config, kept=kept, key=key)
            return jnp.square(model.encode(ids, run_group=runner).hidden).sum()

        compiled = jax.jit(jax.grad(loss))
        return lambda: jax.block_until_ready(compiled(model, batch["input_ids"], jax.random.key(0)))

    return in_turn({f"layers_{kept}_ms": gradient(kept) for kept in KEPT})


def step() -> dict[str, float]:
    import jax

    from effscale.ltd import RandomLTD
    from effscale.training import (
        AdamWConfig,
        ShapeBuckets,
        create_train_state,
        make_train_step,
        next_token_loss,
    )

    model, batch = setup()
    ltd = RandomLTD(pacing=recipe())
    optimizer = AdamWConfig().build(1e-3)
    state = create_train_state(model, optimizer, key=jax.random.key(0))
    train_step = make_train_step(ltd.loss(next_token_loss), optimizer, clip=Clip(1.0))
    buckets = ShapeBuckets(train_step, donate_argnums=0)

    def once(kept):
        def run():
            nonlocal state
            state, metrics = buckets(state, ltd.shape_batch(batch, kept))
            jax.block_until_ready((state, metrics))

        return run

    return in_turn({f"step_{kept}_ms": once(kept) for kept in SCHEDULE})


def gather() -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from effscale.ltd import put_tokens, sample_kept, take_tokens

    setup()
    x = jnp.ones((BATCH, LENGTH, WIDTH))

    def gradient(kept):
        def loss(x, key):
            def layer(x, at):
                return put_tokens(x, at, 1.5 * take_tokens(x, at)), None

            drawn = sample_kept(key, tuple(range(1, LAYERS - 1)), BATCH, LENGTH, kept)
            return jnp.square(jax.lax.scan(layer, x, drawn)[0]).sum()

        compiled = jax.jit(jax.grad(loss))
        return lambda: jax.block_until_ready(compiled(x, jax.random.key(0)))

    return {f"gather_{kept}_ms": 1e3 * seconds(gradient(kept), repeats=20) for kept in KEPT[1:]}


def report(medians: dict[str, dict[str, float]]) -> str:
    import dataclasses

    from effscale.ltd import RandomLTD, training_flops
    from effscale.models import gpt2

    config = gpt2(
        num_layers=LAYERS, d_model=WIDTH, num_heads=HEADS, vocab_size=VOCAB, max_length=LENGTH
    )
    configs = {"layers": dataclasses.replace(config, heads=()), "step": config}
    rows = [("part", "r/S", "ms", "saved", "operations saved", "ratio", "gather and draw, ms")]
    for part, of_part in configs.items():
        times, whole = medians[part], training_flops(of_part, LENGTH)
        full = times[f"{part}_{LENGTH}_ms"]
        for kept in KEPT:
            took = times[f"{part}_{kept}_ms"]
            if kept == LENGTH:
                rows.append((part, "1", f"{took:.1f}", "", "", "", ""))
                continue
            saved, theory = (
                1 - took / full,
                1 - training_flops(of_part, LENGTH, kept=kept) / whole,
            )
            rows.append((
                part, f"{kept / LENGTH:.2f}", f"{took:.1f}", f"{saved:.1%}", f"{theory:.1%}",
                f"{saved / theory:.2f}", f"{medians['gather'][f'gather_{kept}_ms']:.2f}",
            ))  # fmt: skip
    stages = RandomLTD(pacing=recipe()).stages()
    took = stages.total(STEPS, lambda kept: medians["step"][f"step_{kept}_ms"])
    flops = stages.total(STEPS, lambda kept: training_flops(config, LENGTH, kept=kept))
    saved = 1 - took / (STEPS * medians["step"][f"step_{LENGTH}_ms"])
    theory = 1 - flops / (STEPS * training_flops(config, LENGTH))
    rows.append((
        "schedule", "1/16 to 1", f"{took / STEPS:.1f}", f"{saved:.1%}", f"{theory:.1%}",
        f"{saved / theory:.2f}", "",
    ))  # fmt: skip
    return table(rows)


if __name__ == "__main__":
    main({"layers": layers, "step": step, "gather": gather}, rounds=3, report=report)
