"""A small Mixtral: training steps and generation, compared with transformers.

6 layers, width 256, 8 experts of width 512 with two per token, a vocabulary of 8,192; float32 with random weights.
Training: 8 rows of 256 tokens, forward, backward and AdamW. Generation: 8 rows, 128 tokens after 32, greedy.
transformers uses its default experts (`grouped_mm`) and PyTorch's AdamW.
"""

import harness

SHAPE = {"num_layers": 6, "d_model": 256, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 8192}
ROWS, LENGTH, PROMPT, NEW = 8, 256, 32, 128


def effscale() -> dict[str, float]:
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from effscale.generation import SamplingConfig, decode
    from effscale.interop.families.mixtures import llama_of_experts
    from effscale.models import Transformer, unroll
    from effscale.moe import MoEConfig
    from effscale.training import Clip, create_train_state, make_train_step, next_token_loss

    config = llama_of_experts(num_experts=8, k=2, aux_loss=0.02, d_ff=512, **SHAPE)

    def with_capacity(factor: float):
        def block(one):
            moe: MoEConfig = one.feed_forward
            router = dataclasses.replace(moe.router, capacity_factor=factor)
            return dataclasses.replace(one, feed_forward=dataclasses.replace(moe, router=router))

        groups = tuple(
            dataclasses.replace(group, blocks=tuple(block(b) for b in group.blocks))
            for group in config.groups
        )
        return dataclasses.replace(config, groups=groups)

    ids = np.random.default_rng(0).integers(0, 8192, (ROWS, LENGTH + 1)).astype(np.int32)
    batch = {"input_ids": jnp.asarray(ids[:, :-1]), "labels": jnp.asarray(ids[:, 1:])}
    optimizer = optax.adamw(1e-4)
    found = {}
    for name, model_config in (("dropless", config), ("capacity_1", with_capacity(1.0))):
        make = lambda c=model_config: Transformer(c, rngs=nnx.Rngs(0))
        step = jax.jit(
            make_train_step(next_token_loss, optimizer, clip=Clip(1.0)), donate_argnums=0
        )
        state = create_train_state(jax.jit(make)(), optimizer, key=jax.random.key(0))

        def train(step=step):
            nonlocal state
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)

        found[f"train_{name}_tokens_per_second"] = ROWS * LENGTH / harness.seconds(train, repeats=5)
    model = unroll(jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))())
    prompt = batch["input_ids"][:, :PROMPT]
    greedy = SamplingConfig(max_new_tokens=NEW, temperature=0.0)
    run = lambda: jax.block_until_ready(decode(model, prompt, greedy))
    found["generate_tokens_per_second"] = ROWS * NEW / harness.seconds(run, repeats=3)
    return found


def transformers() -> dict[str, float]:
    import torch
    import transformers as hf

    config = hf.MixtralConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        sliding_window=None,
        tie_word_embeddings=False,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
    )
    torch.manual_seed(0)
    model = hf.MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 8192, (ROWS, LENGTH))

    def train() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    found = {"train_tokens_per_second": ROWS * LENGTH / harness.seconds(train, repeats=5)}
    model.eval()
    prompt = ids[:, :PROMPT]
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def run() -> None:
        with torch.inference_mode():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    found["generate_tokens_per_second"] = ROWS * NEW / harness.seconds(run, repeats=3)
    return found


def report(medians: dict[str, dict[str, float]]) -> str:
    base = medians["transformers"]
    lines = []
    for worker, values in medians.items():
        for name, value in values.items():
            if name.endswith("_tokens_per_second"):
                kind = "train" if name.startswith("train") else "generate"
                ratio = value / base[f"{kind}_tokens_per_second"]
                lines.append(
                    f"{worker}, {name.removesuffix('_tokens_per_second')}: {ratio:.2f} x transformers"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    workers = {"effscale": effscale, "effscale@newest": effscale, "transformers": transformers}
    harness.main(workers, rounds=3, report=report)
