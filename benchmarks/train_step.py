"""Training speed of a GPT-2, compared with Hugging Face transformers and with the limit of the machine.

6 layers, width 256, 4 heads, vocabulary 8192, batches of 8 rows of 256 tokens, float32, AdamW. effscale runs a whole
step with gradient clipping and the check for non-finite values; transformers runs forward, backward and AdamW.
"""

from harness import main, seconds

LAYERS, WIDTH, HEADS, VOCAB, BATCH, LENGTH = 6, 256, 4, 8192, 8, 256


def effscale() -> dict[str, float]:
    import dataclasses

    import jax
    import numpy as np
    from flax import nnx

    from effscale.command.line import keep_freed_memory
    from effscale.models import Transformer, gpt2
    from effscale.training import (
        AdamWConfig,
        Clip,
        ShapeBuckets,
        create_train_state,
        make_train_step,
        next_token_loss,
    )

    keep_freed_memory()  # as every experiment does
    config = gpt2(
        num_layers=LAYERS, d_model=WIDTH, num_heads=HEADS, vocab_size=VOCAB, max_length=LENGTH
    )
    model = Transformer(dataclasses.replace(config, remat="dots"), rngs=nnx.Rngs(0))
    optimizer = AdamWConfig().build(1e-3)
    state = create_train_state(model, optimizer, key=jax.random.key(0))
    step = ShapeBuckets(
        make_train_step(next_token_loss, optimizer, clip=Clip(1.0)), donate_argnums=0
    )
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}

    def once() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    took = seconds(once, repeats=20)
    return {"step_ms": took * 1e3, "tokens_per_second": BATCH * LENGTH / took}


def transformers() -> dict[str, float]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCAB, n_positions=LENGTH,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH))

    def once() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    took = seconds(once, repeats=12)
    return {"step_ms": took * 1e3, "tokens_per_second": BATCH * LENGTH / took}


def peak() -> dict[str, float]:
    import jax

    a = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda a: a @ a)
    took = seconds(lambda: product(a).block_until_ready(), repeats=15)
    return {"gflops_per_second": 2 * 2048**3 / took / 1e9}


def report(medians: dict[str, dict[str, float]]) -> str:
    theirs = medians["transformers"]["tokens_per_second"]
    dense = 12 * LAYERS * WIDTH**2 + VOCAB * WIDTH
    attention = 2 * LAYERS * WIDTH * LENGTH  # scores and mixing, whole squares
    flops = 6 * BATCH * LENGTH * (dense + attention)
    limit = BATCH * LENGTH / (flops / medians["peak"]["gflops_per_second"] / 1e9)
    lines = [f"matrix-product limit: {limit:,.0f} tokens/s, {limit / theirs:.2f} x transformers"]
    for name, values in medians.items():
        if name.startswith("effscale"):
            lines.append(f"{name}: {values['tokens_per_second'] / theirs:.2f} x transformers")
    return "\n".join(lines)


if __name__ == "__main__":
    workers = {
        "effscale": effscale,
        "transformers": transformers,
        "effscale@newest": effscale,
        "peak": peak,
    }
    main(workers, rounds=5, report=report)
