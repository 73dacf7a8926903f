"""Whole modules in adapters, against PEFT: classifiers, rewards, embeddings, and modules of layers."""

import jax
import numpy as np
import pytest

from effscale.interop import FolderError, load_adapter, load_pretrained, save_adapter
from effscale.models import ClassHead, add_lora, map_weights, unmerge_lora

torch = pytest.importorskip("torch", reason="the oracle of these tests is PEFT, which needs torch")
hf = pytest.importorskip(
    "transformers", reason="the oracle of these tests is PEFT with transformers"
)
peft = pytest.importorskip("peft", reason="the oracle of these tests is PEFT")

from tests.interop.peft.peft_oracle import (  # noqa: E402
    FAMILIES,
    adapter_of_peft,
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

KEY = jax.random.key(1)


def changed(model, where, seed=0):
    """The model with other numbers in the weights that are meant, as if these were trained."""
    random = np.random.default_rng(seed)
    noise = lambda w: w + np.asarray(0.3 * random.normal(size=w.shape), w.dtype)
    return map_weights(model, noise, where)


def whole_of_peft(model, folder, *, within="modules_to_save", **options):
    """An adapter of PEFT with other numbers in its whole modules."""
    with torch.no_grad():
        adapted = adapter_of_peft(model, folder, **options)
        for name, parameter in adapted.named_parameters():
            if within in name and parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    return adapted


# The class in transformers, the task, the head of ours, and the module that is saved.
CLASSIFIERS = {
    "OPTForSequenceClassification": ("opt", "SEQ_CLS", ClassHead(num_classes=1, name="score", pool="last", bias=False), "score"),
    "LlamaForTokenClassification": ("llama", "TOKEN_CLS", ClassHead(num_classes=3, name="token_classes", pool="none", dropout=0.1), "score"),
    "BertForSequenceClassification": ("bert", "SEQ_CLS", ClassHead(num_classes=3, pool="pooled", dropout=0.1), "classifier"),
    "BertForQuestionAnswering": ("bert", "QUESTION_ANS", ClassHead(num_classes=2, name="span", pool="none"), "qa_outputs"),
}  # fmt: skip


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_a_classifier_on_a_trunk(architecture, tmp_path):
    """The base's files have no head; the adapter of PEFT brings it, ours does, and both give the same outputs."""
    family, task, head, module = CLASSIFIERS[architecture]
    fields = FAMILIES[family][1] | {"num_labels": head.num_classes}
    torch.manual_seed(1)
    model = getattr(hf, architecture)(hf.CONFIG_MAPPING[family](**fields)).eval()
    model.base_model.save_pretrained(tmp_path / "trunk")
    target = ["query"] if family == "bert" else ["q_proj"]
    adapted = whole_of_peft(model, tmp_path / "peft", task_type=task, target_modules=target, r=2)

    def outputs(model):
        rows = torch.tensor(inputs_of(family)).long()
        with torch.no_grad():
            out = model(input_ids=rows)
        spans = "start_logits" in out
        return (
            torch.stack([out.start_logits, out.end_logits], -1) if spans else out.logits
        ).numpy()

    theirs = outputs(adapted)
    base = load_pretrained(tmp_path / "trunk", heads=(head,), key=KEY)
    ours = load_adapter(base, tmp_path / "peft")
    same(np.asarray(run(ours, inputs_of(family))[head.name]), theirs)

    save_adapter(ours, tmp_path / "ours", base=tmp_path / "trunk")
    identical(tmp_path / "peft", tmp_path / "ours")
    assert config_in(tmp_path / "ours")["task_type"] == task
    assert config_in(tmp_path / "ours")["modules_to_save"] == [module]
    config = hf.CONFIG_MAPPING[family](**fields)
    fresh = getattr(hf, architecture)(config).eval()
    fresh.base_model.load_state_dict(
        type(fresh.base_model).from_pretrained(tmp_path / "trunk").state_dict(), strict=False
    )
    np.testing.assert_allclose(outputs(loaded_by_peft(fresh, tmp_path / "ours")), theirs, atol=1e-6)

    # A base with another head is told which one it needs.
    with pytest.raises(
        FolderError,
        match=rf"{module}\.weight: the model has no such module; load the base with heads=\(ClassHead\(num_classes={head.num_classes}, ",
    ):
        load_adapter(load_pretrained(tmp_path / "trunk", heads=()), tmp_path / "peft")


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_the_head_of_a_language_model(tied, tmp_path):
    """PEFT holds an embedding that is its head twice; where an adapter changes one of both only, our one weight cannot."""
    torch_base("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    before = load_pretrained(tmp_path / "base")
    options = {"target_modules": ["q_proj"], "r": 2, "task_type": "CAUSAL_LM"}
    model = torch_base("llama", tie_word_embeddings=tied)
    adapted = whole_of_peft(
        model,
        tmp_path / "peft",
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=tied,
        **options,
    )
    ours = load_adapter(before, tmp_path / "peft")
    same(our_logits("llama", ours), torch_logits("llama", adapted))

    where = r"tokens\.embedding" if tied else r"tokens\.embedding|heads\."
    mine = changed(trained(add_lora(before, rank=2, key=KEY, where=r"query\.kernel")), where)
    names = ("embed_tokens",) if tied else ("embed_tokens", "lm_head")
    save_adapter(mine, tmp_path / "ours", modules_to_save=names)
    assert config_in(tmp_path / "ours")["modules_to_save"] == ["model.embed_tokens", "lm_head"]
    model = torch_base("llama", tie_word_embeddings=tied)
    same(our_logits("llama", mine), torch_logits("llama", loaded_by_peft(model, tmp_path / "ours")))

    if tied:
        model = torch_base("llama", tie_word_embeddings=True)
        whole_of_peft(model, tmp_path / "one", modules_to_save=["lm_head"], **options)
        with pytest.raises(
            FolderError,
            match=r"lm_head and model\.embed_tokens are one weight in this model, but the adapter changes only one of them; PEFT's",
        ):
            load_adapter(before, tmp_path / "one")
        model = torch_base("llama", tie_word_embeddings=True)
        names = ["embed_tokens", "lm_head"]
        whole_of_peft(model, tmp_path / "two", modules_to_save=names, **options)
        with pytest.raises(FolderError, match="are one weight in this model, but differ"):
            load_adapter(before, tmp_path / "two")


def test_modules_of_layers(tmp_path):
    """Norms, fused projections and whole feed-forwards; of some layers, beside pairs of the others."""
    torch_base("gpt2").save_pretrained(tmp_path / "base")
    before = load_pretrained(tmp_path / "base")
    names = ["ln_f", "wpe", "h.1.mlp", "0.attn.c_attn"]
    adapted = whole_of_peft(
        torch_base("gpt2"),
        tmp_path / "peft",
        modules_to_save=names,
        target_modules=["c_fc", "c_attn"],
        r=2,
    )
    ours = load_adapter(before, tmp_path / "peft")
    same(our_logits("gpt2", ours), torch_logits("gpt2", adapted))
    # A stack is one array: the pairs of other layers stand beside it, and what was replaced stays so.
    plain = our_logits("gpt2", unmerge_lora(ours))
    assert np.abs(plain - our_logits("gpt2", before)).max() > 0.1

    mine = changed(
        trained(add_lora(before, rank=2, key=KEY, where=r"feed_forward\.up\.kernel")),
        r"attention\.|final_norm",
    )
    save_adapter(mine, tmp_path / "ours", modules_to_save=("attn", "ln_f"))
    assert len([n for n in tensors_in(tmp_path / "ours") if "lora" not in n]) == 3 * 4 + 2
    theirs = torch_logits("gpt2", loaded_by_peft(torch_base("gpt2"), tmp_path / "ours"))
    same(our_logits("gpt2", mine), theirs)
    same(our_logits("gpt2", load_adapter(before, tmp_path / "ours")), theirs)


def test_a_head_that_stays_behind_is_named(tmp_path):
    """Unless the folder of the base has it, with the same numbers; or the head has a pair."""
    torch_base("vit").save_pretrained(tmp_path / "base")
    before = load_pretrained(tmp_path / "base")
    ours = trained(add_lora(before, rank=2, key=KEY, where=r"query\.kernel"))
    save_adapter(ours, tmp_path / "same", base=tmp_path / "base", modules_to_save=())
    assert config_in(tmp_path / "same")["modules_to_save"] is None
    other = changed(ours, r"heads\.")
    message = r"without the head 'classes' \(classifier\.weight, classifier\.bias\).*modules_to_save=\('classifier',\)"
    for model, base in ((ours, None), (ours, "someone/their-vit"), (other, tmp_path / "base")):
        with pytest.warns(UserWarning, match=message):
            save_adapter(model, tmp_path / "other", base=base, modules_to_save=())
    save_adapter(other, tmp_path / "along")
    assert (
        config_in(tmp_path / "along")["task_type"] is None
    )  # PEFT's tasks of classes are of texts
    model = loaded_by_peft(torch_base("vit"), tmp_path / "along")
    same(our_logits("vit", other), torch_logits("vit", model))
    paired = trained(add_lora(before, rank=2, key=KEY, where=r"heads\..*kernel"))
    save_adapter(paired, tmp_path / "paired")
    assert config_in(tmp_path / "paired")["modules_to_save"] is None
