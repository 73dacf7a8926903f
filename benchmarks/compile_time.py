"""Compile time of the training step with 6 and with 48 layers: stacked layers make it independent of depth."""

from functools import partial

from harness import main


def compile_step(layers: int) -> dict[str, float]:
    import dataclasses
    import time

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from effscale.models import Transformer, gpt2
    from effscale.training import (
        AdamWConfig,
        Clip,
        create_train_state,
        make_train_step,
        next_token_loss,
    )

    config = gpt2(num_layers=layers, d_model=256, num_heads=4, vocab_size=8192, max_length=256)
    config = dataclasses.replace(config, remat="dots")
    optimizer = AdamWConfig().build(1e-3)
    create = lambda: create_train_state(
        Transformer(config, rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0)
    )
    state = jax.eval_shape(create)
    batch = {name: jax.ShapeDtypeStruct((8, 256), jnp.int32) for name in ("input_ids", "labels")}
    step = jax.jit(make_train_step(next_token_loss, optimizer, clip=Clip(1.0)), donate_argnums=0)
    began = time.perf_counter()
    lowered = step.lower(state, batch)
    traced = time.perf_counter()
    lowered.compile()
    done = time.perf_counter()
    return {
        "trace_seconds": traced - began,
        "compile_seconds": done - traced,
        "seconds": done - began,
    }


def report(medians: dict[str, dict[str, float]]) -> str:
    return "\n".join(
        f"48 layers{suffix}: {medians['48 layers' + suffix]['seconds'] / medians['6 layers' + suffix]['seconds']:.2f} x 6 layers"
        for suffix in ("", "@newest")
        if "48 layers" + suffix in medians
    )


if __name__ == "__main__":
    workers = {
        f"{n} layers{suffix}": partial(compile_step, n)
        for suffix in ("", "@newest")
        for n in (6, 48)
    }
    main(workers, rounds=5, report=report)
