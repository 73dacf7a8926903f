"""Models of transformers, loaded by load_pretrained: the same numbers, gradients and greedy texts.

The quick suite has fixed members of all families and classes; `make test-all` draws others at random.
"""

import pathlib
import tempfile

import jax
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from effscale.generation import SamplingConfig, generate
from effscale.interop import load_pretrained
from effscale.interop.save import their_tensors
from tests.interop.spaces import ARCHITECTURES, CLASSES, DECODERS, LLAMAS, RELATIVES, cases, example

torch = pytest.importorskip("torch", reason="the oracle of these tests is PyTorch")
pytest.importorskip("transformers", reason="the oracle of these tests is transformers")

from tests.interop.torch_models import (  # noqa: E402
    batch,
    saved_gradients,
    torch_greedy,
    torch_model,
    torch_outputs,
)

NEW = 20
FIRST = {names[0] for names in DECODERS.values()}
HEADLESS = [pair for pair in CLASSES if pair[0] not in RELATIVES and pair[1] not in FIRST]
# A case takes seconds, so that one that fails is shown as it is and not made smaller.
many = settings(max_examples=40, phases=[Phase.explicit, Phase.generate])


def coefficients(case, outputs, arrays):
    """What the loss multiplies each output, or its log-probabilities, by: nothing at padding."""
    random = np.random.default_rng(8)
    found = {}
    for name, output in outputs.items():
        shape = tuple(output.shape)
        if name == "lm":  # the next token of each
            labels = np.roll(arrays["ids"], -1, 1)
            weights = arrays["mask"] * np.roll(arrays["mask"], -1, 1)
            weights[:, -1] = 0
            chosen = np.eye(shape[-1], dtype=np.float32)[labels] * weights[..., None]
        elif name in ("hidden", "pooled") or shape[-1] == 1:
            chosen = random.normal(size=shape)
        else:
            chosen = np.eye(shape[-1])[random.integers(0, shape[-1], shape[:-1])]
        if "mask" in arrays and len(shape) == 3:
            chosen = chosen * arrays["mask"][..., None]
        found[name] = chosen.astype(np.float32)
    return found


def loss_of(outputs, chosen, log_softmax):
    def part(name, output):
        linear = name in ("hidden", "pooled") or output.shape[-1] == 1
        return -((output if linear else log_softmax(output)) * chosen[name]).sum()

    first, *others = (part(name, output) for name, output in outputs.items())
    return sum(others, start=first)


@jax.jit
def ours(model, arrays, chosen):
    """Outputs, and the gradient of the loss."""

    def loss(model):
        if "images" in arrays:
            outputs = model(arrays["images"])
        else:
            types = arrays.get("types")
            outputs = model(arrays["ids"], attention_mask=arrays["mask"], type_ids=types)
        outputs = {"lm": outputs} if isinstance(outputs, jax.Array) else outputs
        outputs = {name: outputs[name] for name in chosen}
        return loss_of(outputs, chosen, jax.nn.log_softmax), outputs

    return jax.grad(loss, has_aux=True)(model)


def check_outputs(case, mine, theirs, arrays):
    assert mine.keys() == theirs.keys()
    for name, output in theirs.items():
        found, wanted = np.asarray(mine[name]), output.detach().numpy()
        assert found.shape == wanted.shape, name
        assert np.isfinite(found).all(), name  # at padding, too
        if "mask" in arrays and wanted.ndim == 3:
            found, wanted = (x[arrays["mask"] == 1] for x in (found, wanted))
        elif case.model_type == "bert":  # of the first token
            found, wanted = (x[arrays["mask"][:, 0] == 1] for x in (found, wanted))
        difference, scale = np.abs(found - wanted).max(), np.abs(wanted).max()
        assert difference < min(1e-4, 1e-5 * scale), (name, difference, scale)


def check_gradients(case, mine, theirs):
    mine = dict(their_tensors(mine))
    if (
        "cls.predictions.decoder.bias" in theirs
    ):  # of an untied BERT; its other name does nothing in torch
        theirs["cls.predictions.bias"] = theirs["cls.predictions.decoder.bias"]
    assert mine.keys() == theirs.keys()
    rotary = case.model_type in ("gptj", "gpt_neox", *LLAMAS)
    largest = max(np.abs(wanted).max() for wanted in theirs.values())
    for name, wanted in theirs.items():
        scale = np.abs(wanted).max()
        if not rotary and name.endswith(("k_proj.bias", "key.bias")):
            # It adds a constant to a row of scores, which softmax does not see: there is rounding only.
            scale = largest
        if name.endswith(".gate.weight") and case.fields.get("num_experts_per_tok") == 1:
            scale = largest  # of a single expert, whose weight is 1 whatever the router says
        np.testing.assert_allclose(mine[name], wanted, atol=1e-4 * scale, rtol=0, err_msg=name)


def check(case):
    """Outputs with padding on either side, gradients, and greedy generation."""
    theirs = torch_model(case)
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        theirs.save_pretrained(folder / "weights")
        model = load_pretrained(folder / "weights")
        # The last one's gradient is compared; BERT's pooler takes the first token, which has to be one.
        for side in ("left", "right") if case.model_type == "bert" else ("right", "left"):
            arrays = batch(case, side)
            outputs = torch_outputs(case, theirs, arrays)
            chosen = coefficients(case, outputs, arrays)
            gradient, mine = ours(model, arrays, chosen)
            check_outputs(case, mine, outputs, arrays)
        if case.architecture == DECODERS.get(case.model_type, ("",))[0]:
            sampling = SamplingConfig(max_new_tokens=NEW, temperature=0.0, pad_token_id=1)
            found = generate(model, arrays["ids"], sampling, attention_mask=arrays["mask"])
            np.testing.assert_array_equal(found.tokens, torch_greedy(theirs, arrays, NEW))
        loss = loss_of(
            outputs, {n: torch.tensor(x) for n, x in chosen.items()}, lambda x: x.log_softmax(-1)
        )
        loss.backward()
        check_gradients(case, gradient, saved_gradients(theirs, folder / "gradients"))


GPT = {"n_embd": 24, "n_head": 4}
WIDE = {"hidden_size": 24, "num_attention_heads": 4}
EXPERTS = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
NO_BIASES = {"enable_bias": False, "layer_norm_elementwise_affine": False}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 8, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "original_max_position_embeddings": 16,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
# What members of a family differ in, for certain and by name.
MEMBERS = {
    "gpt2": ("gpt2", GPT),
    "gpt2-unscaled": ("gpt2", GPT | {"scale_attn_weights": False}),
    "gpt2-by-layer": ("gpt2", GPT | {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}),
    "opt": ("opt", WIDE),
    "opt-350m": ("opt", WIDE | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt-early-conversion": ("opt", WIDE | {"_remove_final_layer_norm": True}),
    "galactica": ("opt", WIDE | NO_BIASES | {"activation_function": "gelu"}),
    "bloom": ("bloom", {"hidden_size": 24, "n_head": 4}),
    "bloom-6-heads": ("bloom", {"hidden_size": 24, "n_head": 6}),
    "bloom-normed-residual": (
        "bloom",
        {"hidden_size": 24, "n_head": 3, "apply_residual_connection_post_layernorm": True},
    ),
    "gptj": ("gptj", GPT),
    "neox-20b": ("gpt_neox", WIDE | {"rotary_pct": 0.34, "hidden_act": "gelu_fast"}),
    "neox-sequential": (
        "gpt_neox",
        WIDE | {"rotary_pct": 1.0, "use_parallel_residual": False, "attention_bias": False},
    ),
    "neox-yarn": ("gpt_neox", WIDE | {"rope_parameters": YARN | {"partial_rotary_factor": 0.67}}),
    "llama-2": ("llama", WIDE | {"num_key_value_heads": 2}),
    "llama-3": ("llama", WIDE | {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", WIDE | {"rope_parameters": YARN}),
    "mistral-7b": ("mistral", WIDE | {"num_key_value_heads": 2, "sliding_window": 4}),
    "qwen2-windows": (
        "qwen2",
        WIDE | {"num_key_value_heads": 2, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 3,
                "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "mixtral": ("mixtral", WIDE | {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen1.5-moe": ("qwen2_moe", WIDE | EXPERTS | {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen2-moe-windows": (
        "qwen2_moe",
        WIDE | EXPERTS | {"num_hidden_layers": 4, "mlp_only_layers": [0], "norm_topk_prob": True, "qkv_bias": False,
                          "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3},
    ),
    "olmoe": ("olmoe", WIDE | {"num_key_value_heads": 2, "attention_bias": True}),
    "qwen3-moe": (
        "qwen3_moe",
        WIDE | EXPERTS | {"head_dim": 10, "num_hidden_layers": 3, "mlp_only_layers": [0], "norm_topk_prob": True},
    ),
    "llama-one-key": (
        "llama",
        WIDE | {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMBERS)
def test_members_of_families(name):
    model_type, fields = MEMBERS[name]
    special = {"pad_token_id": 1, "bos_token_id": None, "eos_token_id": None}
    check(example(model_type, ARCHITECTURES[model_type][0], **fields, **special))


# Decoders share their heads: two families of them show how these compute, test_round_trip how each names their tensors.
QUICK = ("gpt2", "llama", "bert", "vit")


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [pytest.param(*pair, marks=() if pair[0] in QUICK else pytest.mark.slow) for pair in HEADLESS],
)
def test_other_classes(model_type, architecture):
    other = {"vit": {"num_channels": 3}, "bert": {"pad_token_id": 1, "type_vocab_size": 2}}
    check(example(model_type, architecture, **other.get(model_type, {"pad_token_id": 1})))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@many
@given(data=st.data())
def test_many(model_type, data):
    check(data.draw(cases(model_type)))
