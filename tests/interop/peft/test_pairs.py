"""LoRA adapters against PEFT itself: what it saves we load, and what we save it loads, with the same numbers."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.interop import FolderError, load_adapter, load_pretrained, save_adapter
from effscale.models import add_lora, merge_lora, unmerge_lora

torch = pytest.importorskip("torch", reason="the oracle of these tests is PEFT, which needs torch")
hf = pytest.importorskip(
    "transformers", reason="the oracle of these tests is PEFT with transformers"
)
peft = pytest.importorskip("peft", reason="the oracle of these tests is PEFT")

from tests.interop.peft.peft_oracle import (  # noqa: E402
    FAMILIES,
    adapter_of_peft,
    bits,
    config_in,
    identical,
    inputs_of,
    loaded_by_peft,
    our_logits,
    run,
    same,
    tensors_in,
    torch_base,
    torch_logits,
    trained,
)

# All experts are one array in transformers' memory, and the router is no linear layer, so PEFT has no pairs there.
DENSE = r"(attention|shared|coefficient|feed_forward\.(up|gate|down))\..*kernel"
FUSED = {"gpt2": "c_attn", "bloom": "query_key_value", "gpt_neox": "query_key_value"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a family's model, made once; and a fresh torch model of it at every call."""
    folders = {}

    def get(family, **changes):
        key = (family, *changes.items())
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(family)
            torch_base(family, **changes).save_pretrained(folders[key])
        return folders[key], torch_base(family, **changes)

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_peft(family, base, tmp_path):
    """The same logits, beside the weights and merged into them; unmerged the base; and back again the same bytes."""
    folder, model = base(family)
    plain = torch_logits(family, model)
    adapted = adapter_of_peft(
        model, tmp_path / "peft", target_modules="all-linear", r=3, lora_alpha=5
    )
    theirs = torch_logits(family, adapted)
    assert np.abs(theirs - plain).max() > 0.1

    before = load_pretrained(folder)
    ours = load_adapter(before, tmp_path / "peft")
    same(our_logits(family, ours), theirs)
    same(our_logits(family, merge_lora(ours)), theirs)
    assert jax.tree.structure(unmerge_lora(ours)) == jax.tree.structure(before)
    assert bits(unmerge_lora(ours)) == bits(before)

    save_adapter(ours, tmp_path / "ours", base=folder)
    identical(tmp_path / "peft", tmp_path / "ours")
    written = config_in(tmp_path / "ours")
    assert (written["r"], written["lora_alpha"], written["rank_pattern"]) == (3, 5, {})
    assert written["base_model_name_or_path"] == str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_ours(family, base, tmp_path, getkey):
    """Every dense layer, heads and the patches of images among them, each with a pair of its own."""
    folder, model = base(family)
    before = load_pretrained(folder)
    where = {"where": DENSE} if family == "qwen2_moe" else {}
    ours = trained(add_lora(before, rank=2, alpha=3.0, key=getkey(), **where))
    save_adapter(ours, tmp_path)
    theirs = torch_logits(family, loaded_by_peft(model, tmp_path))
    assert np.abs(theirs - our_logits(family, before)).max() > 0.1
    same(our_logits(family, ours), theirs)

    again = load_adapter(before, tmp_path)
    same(our_logits(family, again), theirs)
    save_adapter(again, tmp_path / "again")
    identical(tmp_path, tmp_path / "again")


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("which", ["query|value", "query", "key"])
def test_a_part_of_a_fused_module(family, which, base, tmp_path, getkey):
    """The pair that stands for all three has zeros for those that have none."""
    folder, model = base(family)
    before = load_pretrained(folder)
    where = rf"attention\.({which})\.kernel"
    ours = trained(add_lora(before, rank=2, key=getkey(), where=where))
    save_adapter(ours, tmp_path)
    assert config_in(tmp_path)["target_modules"] == [FUSED[family]]
    assert config_in(tmp_path)["r"] == 2 * len(which.split("|"))
    same(our_logits(family, ours), torch_logits(family, loaded_by_peft(model, tmp_path)))


def test_pairs_of_experts_are_refused(base, tmp_path, getkey):
    model = load_pretrained(base("qwen2_moe")[0])
    adapted = add_lora(model, rank=2, key=getkey(), where=r"(experts\.up|router).*kernel")
    with pytest.raises(
        ValueError,
        match=r"groups\.0\.blocks\.0\.feed_forward\.experts\.up\.kernel: PEFT does not support a pair there",
    ):
        save_adapter(adapted, tmp_path)


@pytest.mark.parametrize("family", FUSED)
def test_parts_of_a_fused_module_with_different_scales(family, base, tmp_path, getkey):
    folder, model = base(family)
    ours = load_pretrained(folder)
    for name, alpha in (("query", 1.0), ("key", 8.0), ("value", -0.5)):
        ours = add_lora(
            ours, rank=2, alpha=alpha, key=getkey(), where=rf"attention\.{name}\.kernel"
        )
    ours = trained(ours)
    save_adapter(ours, tmp_path)
    assert config_in(tmp_path)["r"] == 6
    assert config_in(tmp_path)["lora_alpha"] == -1.5
    same(our_logits(family, ours), torch_logits(family, loaded_by_peft(model, tmp_path)))


OPTIONS = {
    "some layers": {"layers_to_transform": [0, 2]},
    "other ranks": {"rank_pattern": {"c_attn": 6, r"h\.0\.attn\.c_proj": 1}, "lora_alpha": 2},
    # 4/4 and 2/1 and 4/8: the ratios are powers of two
    "other scales": {
        "rank_pattern": {"0.mlp.c_proj": 1, "2.mlp.c_proj": 8},
        "alpha_pattern": {"0.mlp.c_proj": 2},
    },
    "root of the rank": {"use_rslora": True, "lora_alpha": 7, "r": 3},
    "root of other ranks": {"use_rslora": True, "rank_pattern": {"c_attn": 9, "mlp.c_proj": 2}},
    "a fraction": {"lora_alpha": 0.3},
    "one module": {"target_modules": r".*\.1\.mlp\.c_fc"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_and_scales(name, base, tmp_path):
    """What differs from layer to layer comes back as it was, since what only fills up is left out again."""
    folder, model = base("gpt2")
    options = {"r": 4, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]}
    options |= OPTIONS[name]
    if name == "other ranks":  # alone among its layers it would have a scale of its own
        options["alpha_pattern"] = {r"h\.0\.attn\.c_proj": 0.5}
    theirs = torch_logits("gpt2", adapter_of_peft(model, tmp_path / "peft", **options))
    ours = load_adapter(load_pretrained(folder), tmp_path / "peft")
    same(our_logits("gpt2", ours), theirs)

    save_adapter(ours, tmp_path / "ours")
    if name != "other scales":  # there a power of two has moved from the scale into B
        identical(tmp_path / "peft", tmp_path / "ours")
    model = base("gpt2")[1]
    same(torch_logits("gpt2", loaded_by_peft(model, tmp_path / "ours")), theirs)
    assert config_in(tmp_path / "ours")["use_rslora"] == options.get("use_rslora", False)

    again = load_adapter(load_pretrained(folder), tmp_path / "ours")
    assert bits(again) == bits(ours)
    assert jax.tree.structure(again) == jax.tree.structure(ours)  # the scales, too


def test_scales_that_would_be_rounded(base, tmp_path):
    folder, model = base("gpt2")
    adapter_of_peft(model, tmp_path, r=4, rank_pattern={"1.mlp.c_fc": 3}, target_modules=["c_fc"])
    with pytest.raises(
        FolderError, match=r"transformer\.h\.1\.mlp\.c_fc has the scale 2\.66.* round"
    ):
        load_adapter(load_pretrained(folder), tmp_path)


EMBEDDINGS = {
    "gpt2": ("wte", "wpe"),
    "opt": ("embed_tokens",),
    "bloom": ("word_embeddings",),
    "gptj": ("wte",),
    "gpt_neox": ("embed_in",),
    "llama": ("embed_tokens",),
    "bert": ("word_embeddings", "position_embeddings", "token_type_embeddings"),
}


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_embeddings_and_an_untied_head(family, base, tmp_path, getkey):
    """PEFT saves the weights of some embeddings and heads along with their pairs; they are those of the base."""
    folder, model = base(family, tie_word_embeddings=False)
    head = "predictions.decoder" if family == "bert" else "lm_head"
    chosen = [*EMBEDDINGS[family], head]
    adapted = adapter_of_peft(model, tmp_path / "peft", target_modules=chosen, r=3, lora_alpha=2)
    ours = load_adapter(load_pretrained(folder), tmp_path / "peft")
    same(our_logits(family, ours), torch_logits(family, adapted))
    same(our_logits(family, merge_lora(ours)), torch_logits(family, adapted))

    save_adapter(ours, tmp_path / "ours")
    extra = {name for name in tensors_in(tmp_path / "peft") if "base_layer" in name}
    pairs = {n: t for n, t in tensors_in(tmp_path / "peft").items() if n not in extra}
    assert bool(extra) == (family != "bert")
    written = tensors_in(tmp_path / "ours")
    assert {n: t.tobytes() for n, t in pairs.items()} == {
        n: t.tobytes() for n, t in written.items()
    }

    # Another model's weights among them are refused.
    other = jax.tree.map(lambda leaf: leaf + 1, load_pretrained(folder))
    if extra:
        with pytest.raises(FolderError, match=r"base_layer\.weight: a weight that differs"):
            load_adapter(other, tmp_path / "peft")
    model = base(family, tie_word_embeddings=False)[1]
    where = r"tokens\.embedding|project"
    own = trained(add_lora(load_pretrained(folder), rank=2, key=getkey(), where=where))
    save_adapter(own, tmp_path / "own")
    same(our_logits(family, own), torch_logits(family, loaded_by_peft(model, tmp_path / "own")))


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_an_embedding_that_is_the_head(family, base, tmp_path, getkey):
    """One weight of ours: an adapter that changes both alike is taken and given, and any other refused."""
    folder, model = base(family, tie_word_embeddings=True)
    before = load_pretrained(folder)
    ours = trained(add_lora(before, rank=2, key=getkey(), where=r"tokens\.embedding"))
    save_adapter(ours, tmp_path / "ours")
    theirs = torch_logits(family, loaded_by_peft(model, tmp_path / "ours"))
    same(our_logits(family, ours), theirs)

    if family != "bert":  # whose head PEFT does not know by its name
        model = base(family, tie_word_embeddings=True)[1]
        options = {
            "target_modules": [EMBEDDINGS[family][0], "lm_head"],
            "ensure_weight_tying": True,
        }
        adapted = adapter_of_peft(model, tmp_path / "peft", r=3, **options)
        ours = load_adapter(before, tmp_path / "peft")
        same(our_logits(family, ours), torch_logits(family, adapted))

    alone, model = tmp_path / "alone", base(family, tie_word_embeddings=True)[1]
    adapter_of_peft(model, alone, target_modules=[EMBEDDINGS[family][0]])
    with pytest.raises(
        FolderError, match=r"are one weight in this model, .* ensure_weight_tying=True"
    ):
        load_adapter(before, alone)


OTHERS = {
    "GPT2Model": ("gpt2", "hidden", ["c_attn", "c_fc"]),
    "GPT2ForSequenceClassification": ("gpt2", "classes", ["c_attn", "score"]),
    "LlamaForTokenClassification": ("llama", "token_classes", ["v_proj", "score"]),
    "LlamaForQuestionAnswering": ("llama", "span", ["up_proj", "qa_outputs"]),
    "BertModel": ("bert", "pooled", ["query", "dense"]),
    "BertForSequenceClassification": ("bert", "classes", ["value", "classifier"]),
    "BertForQuestionAnswering": ("bert", "span", ["key", "qa_outputs"]),
    "ViTModel": ("vit", "pooled", ["projection", "fc1", "pooler.dense"]),
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_heads(architecture, tmp_path):
    """Also where classes of texts or tokens are what comes out, or there is no head at all."""
    family, output, chosen = OTHERS[architecture]
    changes = {"pad_token_id": None} if family == "gpt2" else {}
    labels = {"num_labels": 2 if output == "span" else 3}
    torch.manual_seed(1)
    config = hf.CONFIG_MAPPING[family](**FAMILIES[family][1] | labels | changes)
    kind = getattr(hf, architecture)
    model = kind(config).eval()
    model.save_pretrained(tmp_path / "base")
    adapted = adapter_of_peft(model, tmp_path / "peft", target_modules=chosen, r=2)

    def outputs(adapted):
        inputs = torch.tensor(inputs_of(family))
        with torch.no_grad():
            if family == "vit":
                out = adapted(pixel_values=inputs.permute(0, 3, 1, 2))
            else:  # a classifier of texts without a padding token takes one at a time
                rows = [adapted(input_ids=row[None].long()) for row in inputs]
                out = type(rows[0])(
                    **{
                        k: torch.cat([row[k] for row in rows])
                        for k in rows[0]
                        if torch.is_tensor(rows[0][k])
                    }
                )
        found = {
            "hidden": lambda: out.last_hidden_state,
            "pooled": lambda: out.pooler_output,
            "span": lambda: torch.stack([out.start_logits, out.end_logits], -1),
        }
        return found.get(output, lambda: out.logits)().numpy()

    theirs = outputs(adapted)
    ours = load_adapter(load_pretrained(tmp_path / "base"), tmp_path / "peft")
    same(np.asarray(run(ours, inputs_of(family))[output]), theirs)
    save_adapter(ours, tmp_path / "ours")
    identical(tmp_path / "peft", tmp_path / "ours")
    fresh = kind.from_pretrained(tmp_path / "base").eval()
    np.testing.assert_allclose(outputs(loaded_by_peft(fresh, tmp_path / "ours")), theirs, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types_of_numbers(dtype, base, tmp_path):
    """The bytes of the file come back; and a float32 pair beside weights of 16 bits computes as PEFT does."""
    folder, model = base("llama")
    options = {"target_modules": ["q_proj", "down_proj"], "r": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        narrow = peft.get_peft_model(model, peft.LoraConfig(**options)).to(getattr(torch, dtype))
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in narrow.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape))
        narrow.save_pretrained(tmp_path / "narrow")
        wide = adapter_of_peft(
            base("llama")[1].to(getattr(torch, dtype)), tmp_path / "wide", **options
        )
    before = load_pretrained(folder, dtype=dtype)
    ours = load_adapter(before, tmp_path / "narrow")
    save_adapter(ours, tmp_path / "ours")
    identical(tmp_path / "narrow", tmp_path / "ours")

    mixed = load_adapter(before, tmp_path / "wide")
    weight = mixed.groups[0].blocks[0].attention.query.kernel.get_value()
    assert (weight.a.dtype, weight.base.dtype.name) == (jnp.float32, dtype)
    exact = our_logits("llama", load_adapter(load_pretrained(folder), tmp_path / "wide"))
    rounding = np.abs(torch_logits("llama", wide) - exact).max()
    logits = our_logits("llama", mixed)
    assert logits.dtype.name == dtype
    assert np.abs(logits.astype(np.float32) - exact).max() < 1.5 * rounding


def test_a_bin_file_of_old(base, tmp_path):
    folder, model = base("opt")
    adapted = adapter_of_peft(model, tmp_path, target_modules=["q_proj"], r=2)
    tensors = {name: torch.tensor(value) for name, value in tensors_in(tmp_path).items()}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    ours = load_adapter(load_pretrained(folder), tmp_path)
    same(our_logits("opt", ours), torch_logits("opt", adapted))


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_a_bin_file_with_code(base, tmp_path, capsys):
    folder, model = base("opt")
    adapter_of_peft(model, tmp_path, target_modules=["q_proj"], r=2)
    torch.save({"lora": Code()}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(
        FolderError,
        match=r"adapter_model\.bin': its pickle refers to 'print', which no tensor needs\. It was rejected, and nothing in the file",
    ):
        load_adapter(load_pretrained(folder), tmp_path)
    assert "run" not in capsys.readouterr().out


REFUSED = {
    "DoRA": ({"use_dora": True}, [r"use_dora=True: not supported \(DoRA\)", r"lora_magnitude_vector.*: magnitudes"]),
    "biases": ({"bias": "all"}, [r"transformer\.ln_f\.bias: a trained bias", r"h\.1\.attn\.c_attn\.bias: a trained"]),
    "a bias of B": ({"lora_bias": True}, [r"c_fc\.lora_B\.bias: a trained bias"]),
    "a changed base": ({"init_lora_weights": "pissa"}, [r"init_lora_weights='pissa': such an adapter belongs"]),
    "tokens": ({"trainable_token_indices": {"wte": [1]}}, [r"trainable_token_indices=\{'wte': \[1\]\}: not supported \(trained rows of an embedding\)", r"unexpected: .*token_adapter"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, base, tmp_path):
    """All that keeps an adapter from being a set of pairs is in one error."""
    options, messages = REFUSED[name]
    folder, model = base("gpt2")
    options = {"target_modules": ["c_fc"], "r": 2} | options
    adapter_of_peft(model, tmp_path, **options)
    with pytest.raises(FolderError) as error:
        load_adapter(load_pretrained(folder), tmp_path)
    for message in messages:
        assert error.match(message)


def test_another_kind_of_adapter(base, tmp_path):
    folder, model = base("gpt2")
    config = peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(
        FolderError, match=r"peft_type='IA3': only LORA is supported\n  .*c_attn\.ia3_l: "
    ):
        load_adapter(load_pretrained(folder), tmp_path)


def test_an_adapter_of_another_size_or_family(base, tmp_path):
    _, model = base("gpt2", n_embd=24, n_layer=4)
    adapter_of_peft(model, tmp_path, target_modules=["c_attn"], r=2)
    with pytest.raises(FolderError) as error:
        load_adapter(load_pretrained(base("gpt2")[0]), tmp_path)
    assert error.match(
        r"wrong shape: base_model\.model\.transformer\.h\.0\.attn\.c_attn\.lora_A\.weight \[2, 24\], but the model and a rank of 2 need \[2, 16\]"
    )
    assert error.match(r"h\.2\.attn\.c_attn\.lora_B\.weight \[72, 2\], but .* need \[48, 2\]")
    assert error.match(r"transformer\.h\.3\.attn\.c_attn: this model has no such module")
    with pytest.raises(
        FolderError, match=r"to this llama:\n  transformer\.h\.0\.attn\.c_attn: this model has no"
    ):
        load_adapter(load_pretrained(base("llama")[0]), tmp_path)
