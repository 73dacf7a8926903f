"""A layer of experts on a CPU, compared with a dense feed-forward of equal active compute, and its routing compared
with one-hot products.

Times are CPU seconds of the process, which are least affected by other load. The layer is measured from the router to
the weighted sum, forward and backward. Decoding compares one row of a model with 64 experts with the dense model of
equal active size.
"""

import harness


def layer() -> dict[str, float]:
    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from effscale.models import MLPConfig
    from effscale.models.context import build_context
    from effscale.moe import MoEConfig, RouterConfig

    d_model, d_ff = 256, 512

    def gradient(config, tokens: int):
        make = lambda: config.build(d_model, std=0.02, out_std=0.02, rngs=nnx.Rngs(0))
        module = jax.jit(make)()
        x = jax.random.normal(jax.random.key(1), (1, tokens, d_model))
        context = build_context(tokens, kind=None, head_dim=64, causal=True)

        def loss(module, x):
            y, report = module(x, context)
            return (y * y).sum() + report.get("aux_loss", jnp.float32(0))

        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return lambda: jax.block_until_ready(step(module, x))

    expert = MLPConfig(d_ff=d_ff, gated=True, activation="silu", bias=False)
    dense = dataclasses.replace(expert, d_ff=2 * d_ff)
    found = {}
    for experts, tokens in ((8, 2048), (64, 8192)):
        runs = {"dense": gradient(dense, tokens)}
        for name, factor in (("capacity_1", 1.0), ("capacity_1.25", 1.25), ("dropless", None)):
            router = RouterConfig(k=2, eval_capacity_factor=factor)
            runs[name] = gradient(
                MoEConfig(num_experts=experts, expert=expert, router=router), tokens
            )
        times = interleaved(runs)
        for name in ("capacity_1", "capacity_1.25", "dropless"):
            found[f"{experts}_experts_{name}_over_dense"] = times[name] / times["dense"]
    return found


def routing() -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from effscale.moe import top_k_routing
    from effscale.moe.dispatch import (
        from_buffers,
        from_buffers_one_hot,
        to_buffers,
        to_buffers_one_hot,
    )

    tokens, experts, d_model, capacity = 2048, 64, 256, 40
    x = jax.random.normal(jax.random.key(0), (tokens, d_model))
    gate = 0.1 * jax.random.normal(jax.random.key(1), (d_model, experts))

    def moved(there, back):
        def loss(x, gate):
            routing = top_k_routing(jax.nn.softmax(x @ gate), capacity=capacity)
            y = back(jnp.tanh(there(x, routing)), routing)
            return (y * y).sum()

        forward, both = jax.jit(loss), jax.jit(jax.grad(loss, argnums=(0, 1)))
        return (
            lambda: jax.block_until_ready(forward(x, gate)),
            lambda: jax.block_until_ready(both(x, gate)),
        )

    runs = {}
    ways = {
        "table": (to_buffers, from_buffers),
        "one_hot": (to_buffers_one_hot, from_buffers_one_hot),
    }
    for name, way in ways.items():
        runs[f"{name}_forward"], runs[f"{name}_both"] = moved(*way)
    times = interleaved(runs)
    return {
        "one_hot_over_table_forward": times["one_hot_forward"] / times["table_forward"],
        "one_hot_over_table": times["one_hot_both"] / times["table_both"],
        "table_ms": 1e3 * times["table_both"],
    }


def decoding() -> dict[str, float]:
    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from effscale.generation import SamplingConfig
    from effscale.generation.decoding import decode
    from effscale.models import MLPConfig, Transformer, llama, unroll
    from effscale.moe import MoEConfig, RouterConfig, with_experts

    sizes = {"num_layers": 8, "d_model": 512, "num_heads": 8, "vocab_size": 8192}
    dense = llama(**sizes, d_ff=2048)
    expert = dataclasses.replace(MLPConfig(d_ff=1024), activation="silu", gated=True, bias=False)
    router = RouterConfig(k=2, capacity_factor=None, eval_capacity_factor=None)
    experts = with_experts(dense, MoEConfig(num_experts=64, expert=expert, router=router))
    prompt = jnp.arange(16, dtype=jnp.int32)[None]
    runs, new = {}, 64
    for name, config in (("dense", dense), ("experts", experts)):
        model = jax.block_until_ready(
            unroll(jax.jit(lambda c=config: Transformer(c, rngs=nnx.Rngs(0)))())
        )
        for length in (2, 2 + new):
            sampling = SamplingConfig(max_new_tokens=length, temperature=0.0)
            runs[f"{name}_{length}"] = lambda m=model, s=sampling: jax.block_until_ready(
                decode(m, prompt, s)
            )
    times = interleaved(runs, repeats=3)
    each = {
        name: (times[f"{name}_{2 + new}"] - times[f"{name}_2"]) / new
        for name in ("dense", "experts")
    }
    return {
        "dense_tokens_per_second": 1 / each["dense"],
        "experts_tokens_per_second": 1 / each["experts"],
        "experts_over_dense": each["experts"] / each["dense"],
    }


def interleaved(runs, repeats: int = 7) -> dict[str, float]:
    """Return the minimum CPU seconds of each call; calls take turns after one that compiles."""
    import time

    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)
    return {name: min(values) for name, values in times.items()}


def report(medians: dict[str, dict[str, float]]) -> str:
    return "\n".join(
        f"{worker}: {name} {value:.2f}"
        for worker, values in medians.items()
        for name, value in values.items()
    )


if __name__ == "__main__":
    workers = {
        "layer": layer,
        "layer@newest": layer,
        "routing": routing,
        "routing@newest": routing,
        "decoding": decoding,
        "decoding@newest": decoding,
    }
    harness.main(workers, rounds=3, report=report)
