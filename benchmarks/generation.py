"""Generation speed of a GPT-2 compared with Hugging Face transformers: batch 8, prompt 32, 128 new tokens, greedy."""

from harness import main, seconds

LAYERS, WIDTH, HEADS, VOCAB, BATCH, PROMPT, NEW = 6, 256, 4, 8192, 8, 32, 128


def effscale(quantized: bool = False) -> dict[str, float]:
    import time

    import jax
    from flax import nnx

    from effscale.generation import SamplingConfig, generate
    from effscale.models import Transformer, gpt2

    config = gpt2(
        num_layers=LAYERS, d_model=WIDTH, num_heads=HEADS, vocab_size=VOCAB, max_length=256
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    if quantized:
        model = in_8_bits(model)
    prompt = jax.random.randint(jax.random.key(0), (BATCH, PROMPT), 0, VOCAB)
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=0.0)
    once = lambda: generate(model, prompt, sampling).tokens.block_until_ready()
    began = time.perf_counter()
    once()
    compiled = time.perf_counter() - began
    took = seconds(once, repeats=9)
    return {"tokens_per_second": BATCH * NEW / took, "compile_seconds": compiled - took}


def in_8_bits(model):
    """Quantize the weights of the layers and of the tied head, and the inputs of their products."""
    from effscale.quant import Format, Recipe, Rule, quantize_model

    tokens = Format(granularity="token")
    where = (r"layers\..*kernel", r"embed\.tokens\.embedding")
    rules = (Rule(where=one, weights=Format(), activations=tokens) for one in where)
    return quantize_model(model, Recipe(tuple(rules)))


def transformers() -> dict[str, float]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=LAYERS,
        n_embd=WIDTH,
        n_head=HEADS,
        vocab_size=VOCAB,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(1, VOCAB, (BATCH, PROMPT))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    with torch.inference_mode():
        took = seconds(lambda: model.generate(ids, **options), repeats=5, warmup=1)
    return {"tokens_per_second": BATCH * NEW / took}


def report(medians: dict[str, dict[str, float]]) -> str:
    theirs = medians["transformers"]["tokens_per_second"]
    return "\n".join(
        f"{name}: {values['tokens_per_second'] / theirs:.2f} x transformers"
        for name, values in medians.items()
        if name.startswith("effscale")
    )


if __name__ == "__main__":
    main(
        {
            "effscale": effscale,
            "effscale w8a8": lambda: effscale(quantized=True),
            "transformers": transformers,
            "effscale@newest": effscale,
            "effscale w8a8@newest": lambda: effscale(quantized=True),
        },
        rounds=5,
        report=report,
    )
