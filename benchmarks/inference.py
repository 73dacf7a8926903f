"""Time of a forward pass of each model family with 8 rows of 128 tokens, compared with transformers on PyTorch.

Float32, on all cores, four layers of width 512; ViT: 8 images of 176 pixels in patches of 16, which is 122 tokens.
"""

import harness

SIZE = {"num_layers": 4, "d_model": 512, "num_heads": 8}
TEXT = {"vocab_size": 8192}
ROWS, TOKENS, PIXELS = 8, 128, 176


def effscale() -> dict[str, float]:
    import jax
    import numpy as np
    from flax import nnx

    from effscale import models

    configs = {
        "gpt2": models.gpt2(**SIZE, **TEXT),
        "opt": models.opt(**SIZE, **TEXT),
        "bloom": models.bloom(**SIZE, **TEXT),
        "gptj": models.gptj(**SIZE, **TEXT, rotary_dim=32),
        "neox": models.neox(**SIZE, **TEXT),
        "llama": models.llama(**SIZE, **TEXT, d_ff=1536),
        "bert": models.bert(**SIZE, **TEXT, heads=models.bert_pretraining_heads()),
        "vit": models.vit(**SIZE, image_size=PIXELS),
    }
    forward = jax.jit(lambda model, x: model(x))
    times = {}
    for name, config in configs.items():
        model = jax.jit(lambda config=config: models.Transformer(config, rngs=nnx.Rngs(0)))()
        x = inputs(name)
        x = jax.numpy.asarray(x.transpose(0, 2, 3, 1) if name == "vit" else x.astype(np.int32))
        call = lambda model=model, x=x: jax.block_until_ready(forward(model, x))
        times[name] = 1e3 * harness.seconds(call, repeats=15)
    return times


def pytorch() -> dict[str, float]:
    import torch
    import transformers as hf

    layers = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    gpt = {"n_embd": 512, "n_layer": 4, "n_head": 8}
    models = {
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt, **TEXT)),
        "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**layers, **TEXT, ffn_dim=2048)),
        "bloom": lambda: hf.BloomForCausalLM(
            hf.BloomConfig(hidden_size=512, n_layer=4, n_head=8, **TEXT)
        ),
        "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**gpt, **TEXT, rotary_dim=32)),
        "neox": lambda: hf.GPTNeoXForCausalLM(
            hf.GPTNeoXConfig(**layers, **TEXT, intermediate_size=2048)
        ),
        "llama": lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(**layers, **TEXT, intermediate_size=1536)
        ),
        "bert": lambda: hf.BertForPreTraining(
            hf.BertConfig(**layers, **TEXT, intermediate_size=2048)
        ),
        "vit": lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**layers, intermediate_size=2048, image_size=PIXELS, num_labels=1000)
        ),
    }
    times = {}
    for name, make in models.items():
        model, x = make().eval(), torch.tensor(inputs(name))
        with torch.inference_mode():
            times[name] = 1e3 * harness.seconds(lambda m=model, x=x: m(x), repeats=15)
    return times


def inputs(name: str):
    """Return token ids, or images in the layout of torch."""
    import numpy as np

    generator = np.random.default_rng(0)
    if name == "vit":
        return generator.normal(size=(ROWS, 3, PIXELS, PIXELS)).astype(np.float32)
    return generator.integers(0, TEXT["vocab_size"], (ROWS, TOKENS))


def report(medians: dict[str, dict[str, float]]) -> str:
    ours = [name for name in medians if name != "transformers"]
    rows = [("family", "transformers, ms", *(f"{n}, ms" for n in ours), *(f"{n}, x" for n in ours))]
    for family, theirs in medians["transformers"].items():
        times = [medians[name][family] for name in ours]
        rows.append(
            (
                family,
                f"{theirs:.1f}",
                *(f"{t:.1f}" for t in times),
                *(f"{theirs / t:.2f}" for t in times),
            )
        )
    return harness.table(rows)


if __name__ == "__main__":
    harness.main(
        {"transformers": pytorch, "effscale": effscale, "effscale@newest": effscale},
        rounds=5,
        report=report,
    )
