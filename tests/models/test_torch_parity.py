"""The eight families against PyTorch's own implementations, on random weights in float32."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import (
    ACTIVATIONS,
    ClassHead,
    LinearScaling,
    Llama3Scaling,
    Transformer,
    YarnScaling,
    bert,
    bert_pretraining_heads,
    bloom,
    gpt2,
    gptj,
    llama,
    neox,
    opt,
    vit,
)

torch = pytest.importorskip("torch", reason="the oracle of these tests is PyTorch")
hf = pytest.importorskip("transformers", reason="the oracle of these tests is transformers")

SEQ = 11

# Our module -> theirs, in a layer (with {}) and outside; the leaf's name follows from its kind.
# Several names stand for several versions of transformers.
GPT = {
    "attention_norm": "h.{}.ln_1", "feed_forward_norm": "h.{}.ln_2",
    "feed_forward.up": "h.{}.mlp.c_fc h.{}.mlp.fc_in", "feed_forward.down": "h.{}.mlp.c_proj h.{}.mlp.fc_out",
    "attention.query": "h.{}.attn.q_proj", "attention.key": "h.{}.attn.k_proj", "attention.value": "h.{}.attn.v_proj",
    "attention.out": "h.{}.attn.c_proj h.{}.attn.out_proj",
    "embed.tokens": "wte", "embed.positions": "wpe", "final_norm": "ln_f",
}  # fmt: skip
OPT = {
    "attention_norm": "layers.{}.self_attn_layer_norm", "feed_forward_norm": "layers.{}.final_layer_norm",
    "feed_forward.up": "layers.{}.fc1", "feed_forward.down": "layers.{}.fc2",
    "attention.query": "layers.{}.self_attn.q_proj", "attention.key": "layers.{}.self_attn.k_proj",
    "attention.value": "layers.{}.self_attn.v_proj", "attention.out": "layers.{}.self_attn.out_proj",
    "embed.tokens": "embed_tokens", "embed.positions": "embed_positions", "final_norm": "final_layer_norm",
    "embed.into": "project_in", "embed.out_of": "project_out",
}  # fmt: skip
BLOOM = {
    "attention_norm": "h.{}.input_layernorm", "feed_forward_norm": "h.{}.post_attention_layernorm",
    "feed_forward.up": "h.{}.mlp.dense_h_to_4h", "feed_forward.down": "h.{}.mlp.dense_4h_to_h",
    "attention.query": "h.{}.self_attention.q_proj", "attention.key": "h.{}.self_attention.k_proj",
    "attention.value": "h.{}.self_attention.v_proj", "attention.out": "h.{}.self_attention.dense",
    "embed.tokens": "word_embeddings", "embed.norm": "word_embeddings_layernorm", "final_norm": "ln_f",
}  # fmt: skip
NEOX = {
    "attention_norm": "layers.{}.input_layernorm", "feed_forward_norm": "layers.{}.post_attention_layernorm",
    "feed_forward.up": "layers.{}.mlp.dense_h_to_4h", "feed_forward.down": "layers.{}.mlp.dense_4h_to_h",
    "attention.query": "layers.{}.attention.q_proj", "attention.key": "layers.{}.attention.k_proj",
    "attention.value": "layers.{}.attention.v_proj", "attention.out": "layers.{}.attention.dense",
    "embed.tokens": "embed_in", "final_norm": "final_layer_norm", "heads.lm.project": "embed_out lm_head",
}  # fmt: skip
LLAMA = {
    "attention_norm": "layers.{}.input_layernorm", "feed_forward_norm": "layers.{}.post_attention_layernorm",
    "feed_forward.up": "layers.{}.mlp.up_proj", "feed_forward.down": "layers.{}.mlp.down_proj",
    "feed_forward.gate": "layers.{}.mlp.gate_proj",
    "attention.query": "layers.{}.self_attn.q_proj", "attention.key": "layers.{}.self_attn.k_proj",
    "attention.value": "layers.{}.self_attn.v_proj", "attention.out": "layers.{}.self_attn.o_proj",
    "embed.tokens": "embed_tokens", "final_norm": "norm",
}  # fmt: skip
BERT = {
    "attention_norm": "layer.{}.attention.output.LayerNorm", "feed_forward_norm": "layer.{}.output.LayerNorm",
    "feed_forward.up": "layer.{}.intermediate.dense", "feed_forward.down": "layer.{}.output.dense",
    "attention.query": "layer.{}.attention.self.query", "attention.key": "layer.{}.attention.self.key",
    "attention.value": "layer.{}.attention.self.value", "attention.out": "layer.{}.attention.output.dense",
    "embed.tokens": "word_embeddings", "embed.positions": "position_embeddings", "embed.types": "token_type_embeddings",
    "embed.norm": "embeddings.LayerNorm", "pooler": "pooler.dense", "heads.classes.dense": "classifier",
    "heads.mlm.transform": "predictions.transform.dense", "heads.mlm.norm": "predictions.transform.LayerNorm",
    "heads.mlm": "cls.predictions", "heads.nsp.dense": "seq_relationship",
}  # fmt: skip
VIT = {
    "attention_norm": "{}.layernorm_before", "feed_forward_norm": "{}.layernorm_after",
    "feed_forward.up": "{}.mlp.fc1 {}.intermediate.dense", "feed_forward.down": "{}.mlp.fc2 {}.output.dense",
    "attention.query": "{}.attention.q_proj {}.attention.attention.query",
    "attention.key": "{}.attention.k_proj {}.attention.attention.key",
    "attention.value": "{}.attention.v_proj {}.attention.attention.value",
    "attention.out": "{}.attention.o_proj {}.attention.output.dense",
    "embed.patches": "projection", "embed": "embeddings", "embed.positions": "embeddings",
    "final_norm": "layernorm", "pooler": "pooler.dense", "heads.classes.dense": "classifier",
}  # fmt: skip


def split_fused(name, x, heads):
    """Fused query, key and value as three tensors of torch's (out, in) layout."""
    if ".c_attn." in name:  # GPT-2 keeps (in, out)
        parts = np.split(x, 3, axis=-1)
    elif ".query_key_value." in name:
        parts = np.moveaxis(x.reshape(heads, 3, -1, *x.shape[1:]), 1, 0).reshape(
            3, -1, *x.shape[1:]
        )
    else:
        return {name: x}
    return {
        re.sub(r"c_attn|query_key_value", f"{p}_proj", name): y
        for p, y in zip("qkv", parts, strict=True)
    }


def ours(
    model: Transformer, tensors: dict[str, np.ndarray], table: dict[str, str], heads: int
) -> Transformer:
    """A model like ``model`` that holds torch's tensors (weights or gradients); every one is used."""
    named, used = {}, set()
    for name, x in tensors.items():
        pieces = split_fused(name, x, heads)
        conv1d = x.ndim == 2 and re.search(r"attn\.c_attn|\.c_proj\.|\.c_fc\.", name)  # (in, out)
        named |= {k: v.T for k, v in pieces.items()} if conv1d else pieces

    def find(module, kind, layer):
        suffixes = {
            "kernel": ".weight", "scale": ".weight", "bias": ".bias", "embedding": ".weight", "first": ".cls_token",
        }  # fmt: skip
        for pattern in table[module].split():
            want = pattern.format(layer) + suffixes[kind]
            if table is VIT and module == "embed.positions":
                want = "embeddings.position_embeddings"
            for name in named:
                if name == want or name.endswith("." + want):
                    used.add(name)
                    x = named[name]
                    if name.endswith("projection.weight"):  # a patch is (row, column, channel) here
                        return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])
                    return x.T if kind == "kernel" else x
        raise KeyError(f"{module}.{kind} of layer {layer} among {sorted(named)}")

    graphdef, state = nnx.split(model)
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        *module, kind = map(str, path)
        old = variable.get_value()
        if module[0] == "groups":
            first = sum(group.repeat for group in model.config.groups[: int(module[1])])
            layers = range(first, first + old.shape[0])
            value = np.stack([find(".".join(module[4:]), kind, i) for i in layers])
        else:
            value = find(".".join(module), kind, None)
        leaves.append((path, variable.replace(jnp.asarray(value.reshape(old.shape)))))
    tied = {
        name for name in named if re.search(r"lm_head\.weight|predictions\.(decoder|bias)", name)
    }
    assert set(named) - used <= tied, set(named) - used
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


TEXT = {"vocab_size": 53, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
SIZE = {"num_layers": 3, "d_model": 24, "num_heads": 4, "vocab_size": 53}


def gpt2_case(*, scaled=True, by_layer=False):
    names = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 16}
    flags = {"scale_attn_weights": scaled, "scale_attn_by_inverse_layer_idx": by_layer}
    return (
        hf.GPT2LMHeadModel(hf.GPT2Config(**TEXT, **names, **flags)),
        gpt2(**SIZE, max_length=16, scale_attention=scaled, scale_by_layer=by_layer),
        GPT,
    )


def opt_case(theirs=None, **mine):
    names = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 40,
        "max_position_embeddings": 16,
    }
    config = hf.OPTConfig(**TEXT, **names, **{"word_embed_proj_dim": 24} | (theirs or {}))
    return hf.OPTForCausalLM(config), opt(**SIZE, d_ff=40, max_length=16, **mine), OPT


def bloom_case(heads, **theirs):
    config = hf.BloomConfig(**TEXT, hidden_size=24, n_layer=3, n_head=heads, **theirs)
    normed = theirs.get("apply_residual_connection_post_layernorm", False)
    return (
        hf.BloomForCausalLM(config),
        bloom(**SIZE | {"num_heads": heads}, normed_residual=normed),
        BLOOM,
    )


def gptj_case():
    config = hf.GPTJConfig(**TEXT, n_embd=24, n_layer=3, n_head=4, n_positions=16, rotary_dim=4)
    table = {k: v for k, v in GPT.items() if k != "feed_forward_norm"}
    return (
        hf.GPTJForCausalLM(config),
        gptj(**SIZE, rotary_dim=4),
        table | {"heads.lm": "lm_head", "heads.lm.project": "lm_head"},
    )


def rope(scaling):
    """The same scaling in their names."""
    if scaling is None:
        return {"rope_type": "default"}
    names = {"original_max_length": "original_max_position_embeddings"}
    kind = type(scaling).__name__.removesuffix("Scaling").lower()
    return {"rope_type": kind} | {names.get(k, k): v for k, v in vars(scaling).items()}


def neox_case(fraction, *, parallel=True, bias=True, act="gelu", scaling=None):
    config = hf.GPTNeoXConfig(
        **TEXT, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, hidden_act=act,
        use_parallel_residual=parallel, attention_bias=bias, max_position_embeddings=16,
        rope_parameters=rope(scaling) | {"rope_theta": 500.0, "partial_rotary_factor": fraction},
    )  # fmt: skip
    mine = neox(
        **SIZE | {"num_heads": 3},
        d_ff=40,
        rotary_fraction=fraction,
        rotary_base=500.0,
        rotary_scaling=scaling,
        parallel=parallel,
        bias=bias,
        activation=act,
    )
    return hf.GPTNeoXForCausalLM(config), mine, NEOX


def llama_case(kv_heads, *, tied=False, bias=False, head_dim=None, act="silu", scaling=None):
    config = hf.LlamaConfig(
        **TEXT, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads, intermediate_size=40,
        rms_norm_eps=1e-5, attention_bias=bias, mlp_bias=bias, tie_word_embeddings=tied, head_dim=head_dim,
        hidden_act=act, rope_parameters=rope(scaling) | {"rope_theta": 1000.0},
    )  # fmt: skip
    mine = llama(
        **SIZE,
        num_kv_heads=kv_heads,
        d_ff=40,
        head_dim=head_dim,
        rotary_base=1000.0,
        rotary_scaling=scaling,
        activation=act,
        bias=bias,
        mlp_bias=bias,
        tied=tied,
    )
    return hf.LlamaForCausalLM(config), mine, LLAMA | {"heads.lm.project": "lm_head"}


CASES = {
    "gpt2": gpt2_case,
    "gpt2-unscaled": lambda: gpt2_case(scaled=False),
    "gpt2-scaled-by-layer": lambda: gpt2_case(by_layer=True),
    "gpt2-scaled-by-layer-only": lambda: gpt2_case(scaled=False, by_layer=True),
    "opt": opt_case,
    "opt-without-final-norm": lambda: opt_case(
        {"_remove_final_layer_norm": True, "activation_function": "tanh"}, final_norm=False, activation="tanh",
    ),
    "opt-350m": lambda: opt_case({"word_embed_proj_dim": 16, "do_layer_norm_before": False}, d_embed=16, post_norm=True),
    "opt-without-biases": lambda: opt_case(
        {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
        bias=False, norm_affine=False, activation="gelu",
    ),
    "bloom": lambda: bloom_case(4),
    "bloom-6-heads": lambda: bloom_case(6),
    "bloom-normed-residual": lambda: bloom_case(3, apply_residual_connection_post_layernorm=True),
    "gptj": gptj_case,
    "neox": lambda: neox_case(0.25),
    "neox-sequential": lambda: neox_case(0.5, parallel=False, bias=False, act="gelu_fast"),
    "neox-yarn": lambda: neox_case(0.5, act="leaky_relu", scaling=YarnScaling(factor=4.0, original_max_length=8)),
    "llama": lambda: llama_case(2),
    "llama-linear-relu2": lambda: llama_case(2, act="relu2", scaling=LinearScaling(factor=3.0)),
    "llama-llama3": lambda: llama_case(
        2, scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=16)
    ),
    "llama-yarn-mish": lambda: llama_case(
        2, act="mish", scaling=YarnScaling(factor=8.0, original_max_length=64, beta_fast=8.0, mscale=0.7, mscale_all_dim=1.4)
    ),
    "llama-tied-biases-wide-heads": lambda: llama_case(1, tied=True, bias=True, head_dim=8),
}  # fmt: skip


def randomized(model):
    """In float32 and evaluation mode, with biases and norms off their initial values."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.config._attn_implementation = "eager"
    return model.eval()


def pair(case):
    theirs, config, table = case
    theirs = randomized(theirs)
    heads = config.blocks[0].attention.num_heads
    model = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    convert = lambda tensors: ours(model, tensors, table, heads)
    return theirs, convert(state), convert


def batch(side):
    """Ids, and a mask that leaves out 0, 3 and 7 tokens of a row's side."""
    ids = np.random.default_rng(3).integers(2, 53, (3, SEQ))
    mask = np.ones((3, SEQ), np.int64)
    for row, pads in enumerate((0, 3, 7)):
        mask[row, slice(0, pads) if side == "left" else slice(SEQ - pads, SEQ)] = 0
    return ids, mask


def torch_inputs(theirs, ids, mask):
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if not isinstance(
        theirs, (hf.BloomForCausalLM, hf.OPTForCausalLM)
    ):  # those two count real tokens themselves
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs


def check(mine, theirs):
    mine, theirs = np.asarray(mine), theirs.detach().numpy()
    assert mine.shape == theirs.shape
    difference = np.abs(mine - theirs).max()
    assert difference < 1e-4
    assert difference < 1e-5 * max(1.0, np.abs(theirs).max()), (difference, np.abs(theirs).max())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_its_slope(name):
    names = {"gelu_tanh": "gelu_new", "gelu_bloom": "gelu_new"}
    x = torch.linspace(-8, 8, 240, requires_grad=True)  # without the kinks at 0 and 6
    y = hf.activations.ACT2FN[names.get(name, name)](x)
    y.sum().backward()
    slope = jax.vmap(jax.value_and_grad(ACTIVATIONS[name]))
    for found, expected in zip(slope(jnp.asarray(x.detach().numpy())), (y, x.grad), strict=True):
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=5e-6)


forward = jax.jit(lambda model, ids, mask: model(ids, attention_mask=mask))


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    theirs, model, _ = pair(CASES[name]())
    for side in ("left", "right"):
        ids, mask = batch(side)
        logits = forward(model, jnp.asarray(ids, jnp.int32), jnp.asarray(mask, jnp.int32))
        with torch.no_grad():
            expected = theirs(**torch_inputs(theirs, ids, mask)).logits
        check(np.asarray(logits)[mask == 1], expected[torch.tensor(mask) == 1])
        assert np.isfinite(np.asarray(logits)).all()  # at padding, too


@pytest.mark.parametrize("name", ["gpt2", "opt-350m", "bloom-6-heads", "gptj", "neox", "llama"])
def test_gradients(name):
    theirs, model, convert = pair(CASES[name]())
    ids, mask = batch("left")
    labels = np.roll(ids, -1, 1)
    weights = mask * np.roll(mask, -1, 1)
    weights[:, -1] = 0

    logits = theirs(**torch_inputs(theirs, ids, mask)).logits
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), torch.tensor(labels), reduction="none"
    )
    (losses * torch.tensor(weights)).sum().backward()
    expected = convert({k: v.grad.numpy() for k, v in theirs.named_parameters()})

    @jax.jit
    def gradient(model):
        def loss(model):
            log_p = jax.nn.log_softmax(
                model(jnp.asarray(ids, jnp.int32), attention_mask=jnp.asarray(mask))
            )
            return -(
                jnp.take_along_axis(log_p, jnp.asarray(labels)[..., None], 2)[..., 0]
                * jnp.asarray(weights, jnp.float32)
            ).sum()

        return jax.grad(loss)(model)

    found = dict(jax.tree_util.tree_leaves_with_path(gradient(model)))
    wanted = dict(jax.tree_util.tree_leaves_with_path(expected))
    assert found.keys() == wanted.keys()
    for path, grad in found.items():
        name = jax.tree_util.keystr(path)
        scale = np.abs(wanted[path]).max()
        if "attention.key.bias" in name and scale < 1e-4:
            scale = 1.0  # without rotary it adds a constant a row, which softmax does not see: rounding only
        np.testing.assert_allclose(grad, wanted[path], atol=1e-4 * scale, rtol=0, err_msg=name)


def bert_config(**changes):
    return hf.BertConfig(
        **TEXT | {"pad_token_id": 0}, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=16, **changes,
    )  # fmt: skip


BERT_OURS = SIZE | {"d_ff": 40, "max_length": 16}


# An untied head adds its decoder's bias; the other one of that model is not used.
UNTIED = {"heads.mlm.project": "predictions.decoder", "heads.mlm": "predictions.decoder"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_bert_pretraining_and_hidden(side, tied):
    theirs, model, _ = pair(
        (
            hf.BertForPreTraining(bert_config(tie_word_embeddings=tied)),
            bert(**BERT_OURS, heads=bert_pretraining_heads(tied=tied)),
            BERT if tied else BERT | UNTIED,
        )
    )
    ids, mask = batch(side)
    types = np.random.default_rng(4).integers(0, 2, ids.shape)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    arrays = {"attention_mask": mask, "type_ids": types, "positions": positions}
    mine = jax.jit(lambda m, x, kw: m(x, **kw))(
        model, jnp.asarray(ids, jnp.int32), jax.tree.map(jnp.asarray, arrays)
    )
    with torch.no_grad():
        inputs = torch_inputs(theirs, ids, mask) | {"token_type_ids": torch.tensor(types)}
        out, trunk = theirs(**inputs), theirs.bert(**inputs)
    real = torch.tensor(mask) == 1
    check(np.asarray(mine["hidden"])[mask == 1], trunk.last_hidden_state[real])
    check(np.asarray(mine["mlm"])[mask == 1], out.prediction_logits[real])
    if side == "right":  # with left padding the first token is none
        check(mine["pooled"], trunk.pooler_output)
        check(mine["nsp"], out.seq_relationship_logits)


def test_bert_classes():
    config = bert(**BERT_OURS, heads=(ClassHead(num_classes=7, pool="pooled"),))
    theirs, model, _ = pair(
        (hf.BertForSequenceClassification(bert_config(num_labels=7)), config, BERT)
    )
    ids, mask = batch("right")
    mine = forward(model, jnp.asarray(ids, jnp.int32), jnp.asarray(mask, jnp.int32))
    with torch.no_grad():
        check(mine["classes"], theirs(**torch_inputs(theirs, ids, mask)).logits)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_vit(qkv_bias):
    size = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
    }
    config = hf.ViTConfig(
        **size, image_size=12, patch_size=4, num_channels=2, qkv_bias=qkv_bias, num_labels=7
    )
    mine = vit(
        num_layers=3,
        d_model=24,
        num_heads=4,
        d_ff=40,
        image_size=12,
        patch_size=4,
        channels=2,
        num_classes=7,
        qkv_bias=qkv_bias,
    )
    theirs, model, _ = pair((hf.ViTForImageClassification(config), mine, VIT))
    images = np.random.default_rng(2).normal(size=(2, 12, 12, 2)).astype(np.float32)
    out = jax.jit(lambda m, x: m(x))(model, jnp.asarray(images))
    with torch.no_grad():
        pixels = torch.tensor(images.transpose(0, 3, 1, 2))
        check(out["classes"], theirs(pixels).logits)
        check(out["hidden"], theirs.vit(pixels).last_hidden_state)


@pytest.mark.parametrize("act", ["tanh", "sigmoid"])
def test_vit_pooler(act):
    size = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 96,
    }
    theirs = hf.ViTModel(hf.ViTConfig(**size, image_size=8, patch_size=4, pooler_act=act))
    mine = vit(
        num_layers=1,
        d_model=24,
        num_heads=3,
        image_size=8,
        patch_size=4,
        num_classes=None,
        pooler=True,
        pooler_activation=act,
    )
    theirs, model, _ = pair((theirs, mine, VIT))
    images = np.random.default_rng(2).normal(size=(2, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        check(
            jax.jit(lambda m, x: m(x))(model, jnp.asarray(images))["pooled"],
            theirs(torch.tensor(images.transpose(0, 3, 1, 2))).pooler_output,
        )


def test_reward_head_on_an_embedding_of_another_width():
    """A value a token and the last real token's score, as reward models of OPT-350M have it: after project_out."""
    names = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 96,
        "max_position_embeddings": 16,
    }
    config = hf.OPTConfig(
        **TEXT | {"pad_token_id": 1},
        **names,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
        num_labels=1,
    )
    theirs = randomized(hf.OPTForSequenceClassification(config))
    mine = opt(
        num_layers=2,
        d_model=24,
        num_heads=4,
        vocab_size=53,
        max_length=16,
        d_embed=16,
        post_norm=True,
    )
    for pool in ("none", "last"):
        head = ClassHead(num_classes=1, bias=False, pool=pool)
        model = Transformer(dataclasses.replace(mine, heads=(head,)), rngs=nnx.Rngs(0))
        model = ours(
            model,
            {k: v.numpy() for k, v in theirs.state_dict().items()},
            OPT | {"heads.classes.dense": "score"},
            4,
        )
        ids, mask = batch("right")
        ids = np.where(mask == 1, ids, 1)
        scores = forward(model, jnp.asarray(ids, jnp.int32), jnp.asarray(mask, jnp.int32))[
            "classes"
        ]
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
            if pool == "last":
                check(scores, theirs(**inputs).logits)
            else:
                hidden = theirs.model(**inputs).last_hidden_state
                check(np.asarray(scores)[mask == 1], theirs.score(hidden)[torch.tensor(mask) == 1])
