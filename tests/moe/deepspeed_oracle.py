"""DeepSpeed's MoE layer and Megatron's GPT in a few lines of PyTorch, and their way to save: by rank, experts apart."""

import argparse
import collections
import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Mlp(nn.Module):
    def __init__(self, d, d_ff):
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(d, d_ff), nn.Linear(d_ff, d)

    def forward(self, x):
        # Megatron's fused bias and GELU: the factor has eight digits.
        x = self.dense_h_to_4h(x)
        x = 0.5 * x * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))
        return self.dense_4h_to_h(x)


class MoE(nn.Module):
    """Each token's k experts, one token after another; nothing is dropped."""

    def __init__(self, d, expert, num_experts, k=1, residual=False):
        super().__init__()
        self.k, self.num_experts = k, num_experts
        gate = nn.Module()
        gate.wg = nn.Linear(d, num_experts, bias=False)
        experts = nn.Module()
        experts.deepspeed_experts = nn.ModuleList(expert() for _ in range(num_experts))
        self.deepspeed_moe = nn.Module()
        self.deepspeed_moe.gate, self.deepspeed_moe.experts = gate, experts
        if residual:
            self.mlp, self.coefficient = expert(), nn.Linear(d, 2)

    def forward(self, x):
        rows, experts = x.reshape(-1, x.shape[-1]), self.deepspeed_moe.experts.deepspeed_experts
        probs, chosen = F.softmax(self.deepspeed_moe.gate.wg(rows), -1).topk(self.k)
        if self.k > 1:
            probs = probs / probs.sum(-1, keepdim=True)
        each = [
            sum(p * experts[int(e)](row) for p, e in zip(*pair, strict=True))
            for row, *pair in zip(rows, probs, chosen, strict=True)
        ]
        y = torch.stack(each).reshape(x.shape)
        if not hasattr(self, "mlp"):
            return y
        pair = F.softmax(self.coefficient(x), -1)
        return y * pair[..., :1] + self.mlp(x) * pair[..., 1:]


D, D_FF = 6, 10


class Net(nn.Module):
    """A user's own: a residual layer, and one with other numbers of experts and of choices."""

    def __init__(self):
        super().__init__()
        expert = lambda: Mlp(D, D_FF)
        self.inner = nn.Linear(D, D)
        self.first = MoE(D, expert, 4, residual=True)
        self.second = nn.Sequential(MoE(D, expert, 12, k=2))


def net():
    return random_weights(Net())


class Block(nn.Module):
    def __init__(self, d, heads, mlp):
        super().__init__()
        self.heads, self.mlp = heads, mlp
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.self_attention = nn.Module()
        self.self_attention.query_key_value = nn.Linear(d, 3 * d)
        self.self_attention.dense = nn.Linear(d, d)

    def forward(self, x):
        batch, seq, d = x.shape
        fused = self.self_attention.query_key_value(self.input_layernorm(x))
        q, k, v = fused.view(batch, seq, self.heads, -1).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.self_attention.dense(y.transpose(1, 2).reshape(batch, seq, d))
        return x + self.mlp(self.post_attention_layernorm(x))


class Gpt(nn.Module):
    """Megatron's GPT, with the names of its parameters; experts where the count of a layer is above 1."""

    def __init__(self, counts, d=12, heads=2, d_ff=16, vocab=20, length=8, k=1, residual=False):
        super().__init__()
        model, embedding, encoder = nn.Module(), nn.Module(), nn.Module()
        mlp = lambda: Mlp(d, d_ff)
        layer = lambda n: MoE(d, mlp, n, k, residual) if n > 1 else mlp()
        encoder.layers = nn.ModuleList(Block(d, heads, layer(n)) for n in counts)
        encoder.final_layernorm = nn.LayerNorm(d)
        embedding.word_embeddings = nn.Embedding(vocab, d)
        embedding.position_embeddings = nn.Embedding(length, d)
        model.embedding, model.encoder, self.language_model = embedding, encoder, model

    def forward(self, ids):
        model = self.language_model
        words = model.embedding.word_embeddings.weight
        x = words[ids] + model.embedding.position_embeddings.weight[: ids.shape[1]]
        for block in model.encoder.layers:
            x = block(x)
        return model.encoder.final_layernorm(x) @ words.T


def random_weights(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def save_experts(model, folder, ep_size=1):
    """As each first process of an expert-parallel group does it: its own experts, renamed from its own numbers to those of the layer."""
    marker = ".deepspeed_moe.experts.deepspeed_experts."
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, MoE)]
    for layer, (layer_name, module) in enumerate(layers):
        local = module.num_experts // ep_size
        for rank in range(ep_size):
            held = {}  # the state dict of this rank's layer
            for name, weight in module.state_dict().items():
                if match := re.match(r"deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.", name):
                    number = int(match[1]) - rank * local
                    if 0 <= number < local:
                        rest = name[match.end() :]
                        held[f"{layer_name}{marker}{number}.{rest}"] = weight
            files = collections.defaultdict(dict)
            for name, weight in held.items():
                number = re.match(f".*{re.escape(marker)}([0-9]+).*", name)[1]
                whole = rank * local + int(number)
                renamed = name.replace(f"{marker}{number}", f"{marker}{whole}")
                files[whole][renamed] = weight.clone().detach()
            for whole, state in files.items():
                torch.save(
                    state, folder / f"layer_{layer}_expert_{whole}_mp_rank_00_model_states.pt"
                )
    return [module.num_experts for _, module in layers]


def rest_of(model):
    """The state dict without the names that DeepSpeed takes for experts'."""
    state = model.state_dict()
    return {n: w for n, w in state.items() if "expert" not in n or "moe.gate.wg.weight" in n}


def save(model, folder, ep_size=1, module=None, **client):
    counts = save_experts(model, folder, ep_size)
    state = {
        "module": rest_of(model) if module is None else module,
        "optimizer": None,
        "lr_scheduler": {"num_iterations": 3},
        "num_experts": counts,
        "dp_world_size": ep_size,
        "mp_world_size": 1,
        "global_steps": 1,
        "ds_config": {"train_batch_size": 4},
        "ds_version": "0.16.5",
    }
    torch.save(state | client, folder / "mp_rank_00_model_states.pt")


def save_megatron(model, folder, **args):
    """Nested as Megatron's `state_dict_for_save_checkpoint`, with what its `save_checkpoint` adds."""
    module = {"language_model": {"embedding": {}, "encoder": {}}}
    for name, weight in rest_of(model).items():
        _, section, inner = name.split(".", 2)
        into = module["language_model"][section]
        if section == "embedding":
            part, inner = inner.split(".", 1)
            into = into.setdefault(part, {})
        into[inner] = weight
    # The experts of the saving process itself; newer versions of DeepSpeed leave them here.
    first = "layers.1.mlp.deepspeed_moe.experts.deepspeed_experts.0.dense_h_to_4h.bias"
    module[f"encoder{first}"] = torch.zeros(3)
    numbers = np.random.RandomState(0).get_state()
    rng = [{"np_rng_state": numbers, "torch_rng_state": torch.get_rng_state()}]
    more = {"iteration": 1, "rng_state": rng, "checkpoint_version": 3.0}
    save(model, folder, module=module, args=argparse.Namespace(**args), **more)
