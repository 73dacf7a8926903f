"""Other heads than those of a folder: what is loaded, what is initialized, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from effscale.interop import FolderError, load_pretrained, save_pretrained
from effscale.interop.plan import parameters
from effscale.models import ClassHead, LMHead
from effscale.parallel import MeshConfig
from tests.interop.files import bits_of, model_of_numbers, read_folder, write_folder
from tests.interop.spaces import example

SCORE = ClassHead(name="score", num_classes=1, pool="last", bias=False)
VALUE = ClassHead(name="value", num_classes=1, pool="none", bias=False)
KEY = jax.random.key(3)


@pytest.fixture
def folder(tmp_path):
    """The folder of a tiny model of random numbers, made where it is first asked for."""

    def get(model_type, architecture, **fields):
        place = tmp_path / architecture
        if not place.exists():
            case = example(model_type, architecture, **fields)
            save_pretrained(model_of_numbers(case.config), place)
        return place

    return get


def trunk_of(model):
    return {name: bits for name, bits in bits_of(model).items() if "heads" not in name}


# An embedding of another width, and the last norm missing, as OPT-350M; a head that is not the embedding; a family whose
# `score` is also the name of its classes of tokens; a pooler.
REWARDS = {
    "OPTForCausalLM": ("opt", {"word_embed_proj_dim": 5, "do_layer_norm_before": False}),
    "GPTNeoXForCausalLM": ("gpt_neox", {}),
    "LlamaForCausalLM": ("llama", {}),
    "BertForMaskedLM": ("bert", {"type_vocab_size": 2}),
}


@pytest.mark.parametrize("architecture", REWARDS)
def test_a_language_model_becomes_a_reward_of_transformers(architecture, tmp_path):
    """The trunk's bits are the folder's; what is saved is a sequence classifier with one label there, of the same scores."""
    torch = pytest.importorskip("torch", reason="the oracle is transformers, which needs torch")
    hf = pytest.importorskip("transformers", reason="the oracle is transformers")
    from tests.interop.torch_models import batch, complaints, torch_model

    model_type, fields = REWARDS[architecture]
    case = example(model_type, architecture, pad_token_id=1, **fields)
    torch_model(case).save_pretrained(tmp_path / "lm")
    head = SCORE
    if model_type == "bert":
        head = dataclasses.replace(SCORE, pool="pooled", bias=True)
    reward = load_pretrained(tmp_path / "lm", heads=(head,), key=KEY)
    rest = {name: bits for name, bits in trunk_of(reward).items() if "pooler" not in name}
    assert rest == trunk_of(load_pretrained(tmp_path / "lm"))
    assert reward.config.pooler == (model_type == "bert")

    save_pretrained(reward, tmp_path / "reward", like=tmp_path / "lm")
    with complaints() as said:
        theirs = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert not said
    assert theirs.num_labels == 1
    run = jax.jit(lambda model, ids, mask: model(ids, attention_mask=mask)["score"])
    for side in ("right",) if model_type == "bert" else ("left", "right"):
        arrays = batch(case, side)
        ids, mask = (torch.tensor(arrays[name]) for name in ("ids", "mask"))
        positions = (
            {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if model_type != "opt" else {}
        )
        with torch.no_grad():
            scores = theirs(input_ids=ids.long(), attention_mask=mask, **positions).logits
        ours = run(reward, arrays["ids"], arrays["mask"])
        np.testing.assert_allclose(ours, scores, atol=1e-5)

    # Its own files, and transformers', hold this very head: nothing is initialized, and no key needed.
    theirs.save_pretrained(tmp_path / "theirs")
    for place in ("reward", "theirs"):
        assert bits_of(load_pretrained(tmp_path / place, heads=(head,))) == bits_of(reward)


def test_a_critic_starts_from_a_reward(folder, tmp_path):
    """A file's `score`, and DeepSpeed-Chat's `v_head`, under each of the names of one output."""
    reward = load_pretrained(folder("gpt2", "GPT2LMHeadModel"), heads=(SCORE,), key=KEY)
    save_pretrained(reward, tmp_path / "hf")
    tensors = read_folder(tmp_path / "hf")
    chat = {f"rw{name}": a for name, a in tensors.items() if name != "score.weight"}
    fields = example("gpt2", "GPT2LMHeadModel").json
    write_folder(tmp_path / "chat", chat | {"v_head.weight": tensors["score.weight"]}, fields)
    weight = np.asarray(reward.heads["score"].dense.kernel.get_value())
    for place in ("hf", "chat"):
        for head in (VALUE, SCORE, dataclasses.replace(SCORE, name="classes")):
            model = load_pretrained(tmp_path / place, heads=(head,))
            np.testing.assert_array_equal(model.heads[head.name].dense.kernel.get_value(), weight)
            assert trunk_of(model) == trunk_of(reward)


def test_values_depend_on_the_key_and_the_name(folder):
    """Of the type of the folder, as wide as asked, with the spread that the model starts with."""
    place = folder("bloom", "BloomForCausalLM")
    classes = ClassHead(num_classes=300, pool="mean")
    load = lambda key, *heads: load_pretrained(place, heads=heads, key=key, dtype="bfloat16")
    kernel = lambda model: np.asarray(model.heads["classes"].dense.kernel.get_value(), np.float32)
    one = load(KEY, classes)
    assert one.heads["classes"].dense.kernel.get_value().dtype == jnp.bfloat16
    assert not np.any(np.asarray(one.heads["classes"].dense.bias.get_value()))
    assert abs(kernel(one).std() / one.config.init_std - 1) < 0.1
    both = load(KEY, LMHead(), VALUE, classes)
    np.testing.assert_array_equal(kernel(both), kernel(one))
    assert set(both.heads) == {"lm", "value", "classes"}
    assert not np.array_equal(kernel(load(jax.random.key(4), classes)), kernel(one))


def test_the_trunk_alone(folder):
    """No key is needed where there is nothing to initialize; a BERT keeps its pooler, which belongs to its trunk."""
    model = load_pretrained(folder("gpt_neox", "GPTNeoXForCausalLM"), heads=())
    assert (model.config.heads, list(model.heads)) == ((), [])
    bert = folder("bert", "BertForPreTraining")
    assert load_pretrained(bert, heads=()).config.pooler
    each = ClassHead(name="token_classes", num_classes=4, pool="none")
    tagger = load_pretrained(bert, heads=(each,), key=KEY)
    assert not tagger.config.pooler  # transformers' class has none either
    save_pretrained(tagger, bert / "out")
    assert load_pretrained(bert / "out", heads=(each,)).config == tagger.config
    nsp = ClassHead(name="nsp", num_classes=2, pool="pooled")
    whole = bits_of(load_pretrained(bert))
    assert bits_of(load_pretrained(bert, heads=(nsp,))).items() <= whole.items()


def test_a_trunk_gets_a_head_for_the_next_token(folder):
    """The embedding's transpose needs no key, and a matrix of its own does."""
    place = folder("llama", "LlamaModel")
    ids = jnp.asarray([[4, 5, 6]])
    trunk = load_pretrained(place)
    tied = load_pretrained(place, heads=(LMHead(),))
    np.testing.assert_allclose(
        tied(ids),
        trunk(ids)["hidden"] @ parameters(trunk)["embed.tokens.embedding"].get_value().T,
        atol=1e-5,
    )
    with pytest.raises(
        ValueError,
        match=r"has no tensors for the head 'lm'\. Pass a key to initialize them, such as key=jax\.random\.key\(0\)",
    ):
        load_pretrained(place, heads=(LMHead(tied=False),))
    untied = load_pretrained(place, heads=(LMHead(tied=False),), key=KEY)
    assert untied.heads["lm"].project.kernel.get_value().shape == (8, 31)


def test_on_a_mesh(folder):
    mesh = MeshConfig(data=2, fsdp=4).build()
    load = lambda **more: load_pretrained(
        folder("llama", "LlamaModel"), heads=(LMHead(tied=False),), key=KEY, **more
    )
    divided = load(mesh=mesh)
    kernel = divided.heads["lm"].project.kernel.get_value()
    assert kernel.sharding.spec == PartitionSpec("fsdp", None)
    assert bits_of(divided) == bits_of(load())


def test_a_head_of_another_form_is_not_initialized_in_silence(folder):
    three = folder("gpt2", "GPT2ForSequenceClassification")  # 3 classes, without a bias
    five = ClassHead(num_classes=5, pool="last", bias=False)
    with pytest.raises(
        ValueError,
        match=r"'classes' has num_classes=5, but the folder's 'classes' has 3; initialize=\('classes',\) initializes it",
    ):
        load_pretrained(three, heads=(five,), key=KEY)
    fresh = load_pretrained(three, heads=(five,), initialize=("classes",), key=KEY)
    assert fresh.heads["classes"].dense.kernel.get_value().shape == (8, 5)
    own = load_pretrained(three)
    again = load_pretrained(three, initialize=("classes",), key=KEY)
    assert trunk_of(again) == trunk_of(own)
    assert bits_of(again) != bits_of(own)

    biased = ClassHead(num_classes=3, pool="last")
    with pytest.raises(
        ValueError, match=r"'classes' needs score\.bias, which the folder lacks \(bias=False\)"
    ):
        load_pretrained(three, heads=(biased,), key=KEY)
    lm = folder("gptj", "GPTJForCausalLM")
    with pytest.raises(
        ValueError, match=r"'lm' has no place for lm_head\.bias of the folder \(bias=True\)"
    ):
        load_pretrained(lm, heads=(LMHead(tied=False),), key=KEY)
    with pytest.raises(
        ValueError, match="'lm' has tied=True, but the folder's 'lm' is a separate matrix"
    ):
        load_pretrained(lm, heads=(LMHead(bias=True),))
    tied = folder("gpt2", "GPT2LMHeadModel")
    with pytest.raises(
        ValueError, match="'lm' has tied=False, but the folder's 'lm' is the transposed embedding"
    ):
        load_pretrained(tied, heads=(LMHead(tied=False),), key=KEY)


REFUSED = {
    "an encoder has no next token": ("bert", "BertModel", (LMHead(),), "family bert has no head that predicts the next token.*mlm"),
    "images are no tokens": ("vit", "ViTModel", (LMHead(name="words"),), r"LMHead needs token inputs\. Use ClassHead for images"),
    "no pooler": ("opt", "OPTModel", (ClassHead(num_classes=2, pool="pooled"),), "the head 'classes' has pool='pooled', but the family opt has no pooler"),
    "one name twice": ("gpt2", "GPT2Model", (SCORE, SCORE), r"TransformerConfig\.heads must be heads with different names, got \(ClassHead\(num_classes=1, name='score',"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_heads_that_cannot_be(case, folder):
    model_type, architecture, heads, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder(model_type, architecture), heads=heads, key=KEY)


def test_initialize_names_heads(folder):
    with pytest.raises(
        ValueError,
        match=r"initialize must name heads of the model, which are \['lm'\], got \['value'\]",
    ):
        load_pretrained(folder("gpt2", "GPT2LMHeadModel"), initialize=("value",), key=KEY)


def test_what_is_no_head_is_still_missed_and_unexpected(folder, tmp_path):
    place = folder("gpt2", "GPT2LMHeadModel")
    tensors = read_folder(place)
    del tensors["transformer.ln_f.bias"]
    tensors["transformer.extra"] = np.ones(3, np.float32)
    write_folder(tmp_path / "other", tensors, example("gpt2", "GPT2LMHeadModel").json)
    with pytest.raises(FolderError, match=r"missing: ln_f\.bias \[8\]\n  unexpected: extra \[3\]"):
        load_pretrained(tmp_path / "other", heads=(SCORE,), key=KEY)


UNSAVED = {
    "no class in transformers": ("olmoe", "OlmoeForCausalLM", SCORE, "no Olmoe with the heads \\['score'\\]"),
    "a bias": ("gpt2", "GPT2Model", dataclasses.replace(SCORE, bias=True), "transformers has no family with this config: the head 'score' must have bias=False, as in transformers, got True"),
    "another name": ("gpt2", "GPT2Model", dataclasses.replace(SCORE, name="mood"), "no GPT2 with the heads \\['mood'\\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSAVED)
def test_heads_that_transformers_has_not(case, folder, tmp_path):
    """They load and train here; only the way back is closed."""
    model_type, architecture, head, message = UNSAVED[case]
    model = load_pretrained(folder(model_type, architecture), heads=(head,), key=KEY)
    with pytest.raises(ValueError, match=message):
        save_pretrained(model, tmp_path / "out")
