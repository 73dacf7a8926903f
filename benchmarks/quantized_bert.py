"""Forward pass of a BERT-base in 8 bits, compared with float32 and with PyTorch's dynamic quantization.

Eight rows of 128 tokens, random weights, all cores. Each library's float32 and 8-bit models are timed in turn in one process.
"""

from collections.abc import Callable, Mapping

import harness

LAYERS, WIDTH, HEADS, VOCAB, ROWS, TOKENS, REPEATS = 12, 768, 12, 30522, 8, 128, 7


def effscale() -> dict[str, float]:
    import jax
    from flax import nnx

    from effscale.models import Transformer, bert
    from effscale.quant import Format, Recipe, Rule, quantize_model, w8a8

    config = bert(num_layers=LAYERS, d_model=WIDTH, num_heads=HEADS, vocab_size=VOCAB)
    model = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    symmetric = Rule(
        where=r"layers\..*kernel", weights=Format(), activations=Format(granularity="token")
    )
    models = {
        "float32": model,
        "w8a8": quantize_model(model, w8a8()),
        "w8a8_symmetric": quantize_model(model, Recipe((symmetric,))),
    }
    ids = jax.random.randint(jax.random.key(0), (ROWS, TOKENS), 0, VOCAB)
    forward = jax.jit(lambda model, ids: model.encode(ids).hidden)
    return in_turn(
        {
            name: lambda model=model: jax.block_until_ready(forward(model, ids))
            for name, model in models.items()
        }
    )


def pytorch() -> dict[str, float]:
    import torch
    import transformers as hf

    options = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    model = hf.BertModel(hf.BertConfig(**options, intermediate_size=4 * WIDTH)).eval()
    models = {"float32": model}
    for engine in ("x86", "onednn"):
        if engine in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = engine
            dynamic = torch.ao.quantization.quantize_dynamic
            models[f"quantize_dynamic_{engine}"] = dynamic(model, {torch.nn.Linear})
    ids = torch.randint(0, VOCAB, (ROWS, TOKENS))
    with torch.inference_mode():
        return in_turn({name: lambda model=model: model(ids) for name, model in models.items()})


def in_turn(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median milliseconds of each call, A B C A B C ..., after two warmup calls each."""
    import statistics
    import time

    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(2 + REPEATS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {f"{name}_ms": statistics.median(found[2:]) for name, found in times.items()}


def report(medians: dict[str, dict[str, float]]) -> str:
    lines = []
    for worker, times in medians.items():
        for name, milliseconds in times.items():
            if name.endswith("_ms") and name != "float32_ms":
                own = times["float32_ms"] / milliseconds
                theirs = medians["pytorch"]["float32_ms"] / milliseconds
                lines.append(
                    f"{worker}, {name.removesuffix('_ms')}: {own:.2f} x its float32, {theirs:.2f} x PyTorch's"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    workers = {"effscale": effscale, "effscale@newest": effscale, "pytorch": pytorch}
    harness.main(workers, rounds=3, report=report)
