"""Out and in again: every tensor keeps its bits, for every class of transformers, with and without transformers."""

import dataclasses
import json
import pathlib
import tempfile
import warnings

import jax
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from effscale.interop import load_pretrained, save_pretrained
from effscale.interop.describe import essence
from tests.interop.files import (
    DTYPES,
    bits_of,
    bytes_of,
    model_of_bits,
    model_of_numbers,
    random_bits,
    read_folder,
    size_of,
    write_folder,
)
from tests.interop.spaces import ARCHITECTURES, CLASSES, cases, example

# A case takes a second, so that one that fails is shown as it is and not made smaller.
several = settings(max_examples=20, phases=[Phase.explicit, Phase.generate])
# A tiny model of each class, in each of the types by turns; `make test-all` draws others at random.
FIXED = [(*pair, DTYPES[number % len(DTYPES)]) for number, pair in enumerate(CLASSES)]
of_every_class = pytest.mark.parametrize(("model_type", "architecture", "dtype"), FIXED)
# Random bits are often no number, of which the loader warns.
pytestmark = [
    pytest.mark.exact,
    pytest.mark.filterwarnings("ignore:.*contains NaN:UserWarning"),
]


@pytest.fixture(scope="module")
def hf():
    pytest.importorskip("torch", reason="transformers needs PyTorch to save and load")
    return pytest.importorskip("transformers", reason="transformers saves and loads here")


def saved(model, folder, **options):
    save_pretrained(model, folder, **options)
    return read_folder(folder)


@of_every_class
def test_out_in_out(model_type, architecture, dtype):
    out_in_out(example(model_type, architecture), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@several
@given(data=st.data())
def test_any_model_out_in_out(model_type, data):
    out_in_out(data.draw(cases(model_type)), data.draw(st.sampled_from(DTYPES)))


def out_in_out(case, dtype):
    model = model_of_bits(case.config, dtype)
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        first = saved(model, folder / "first")
        back = load_pretrained(folder / "first")
        assert bits_of(back) == bits_of(model)
        assert back.config.dtype == dtype
        assert essence(back.config) == essence(case.config)
        fields = json.loads((folder / "first" / "config.json").read_text())
        assert fields["architectures"] == [case.architecture]
        assert fields["dtype"] == dtype
        again = saved(back, folder / "second", max_shard_size=size_of(first) // 3)
        assert bytes_of(again) == bytes_of(first)
        assert len(list((folder / "second").glob("*.safetensors"))) > 1


def transformers_model(case, dtype):
    """A model of transformers, of random bits."""
    import torch

    from tests.interop.torch_models import torch_model

    random = np.random.default_rng(0)
    model = torch_model(case).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            array = random_bits(random, tuple(parameter.shape), dtype)
            parameter.data = as_torch(array)
        if hasattr(model, "cls") and hasattr(model.cls, "predictions"):
            model.tie_weights()
            model.cls.predictions.bias.data = model.cls.predictions.decoder.bias.data.clone()
    return model


def as_torch(array):
    """The same bits in torch."""
    import torch

    integers = array.view(f"int{8 * array.itemsize}").copy()
    return torch.from_numpy(integers).view(getattr(torch, array.dtype.name))


def as_integers(tensor):
    """The bits of a tensor, which equal themselves even where they are no number."""
    import torch

    return tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16)


@of_every_class
def test_out_of_transformers_and_back(hf, model_type, architecture, dtype):
    out_of_transformers_and_back(hf, example(model_type, architecture), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@several
@given(data=st.data())
def test_any_model_out_of_transformers_and_back(hf, model_type, data):
    case = data.draw(cases(model_type))
    out_of_transformers_and_back(hf, case, data.draw(st.sampled_from(DTYPES)))


def out_of_transformers_and_back(hf, case, dtype):
    from tests.interop.torch_models import complaints

    theirs = transformers_model(case, dtype)
    bare = case.architecture in ("BertModel", "ViTModel")
    pooler = {"add_pooling_layer": case.pooler} if bare else {}
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        theirs.save_pretrained(folder / "theirs")
        model = load_pretrained(folder / "theirs")
        exported = saved(model, folder / "ours", max_shard_size=4000)
        assert bytes_of(exported) == bytes_of(read_folder(folder / "theirs"))
        assert bits_of(load_pretrained(folder / "ours")) == bits_of(model)
        with complaints() as said:
            kind = getattr(hf, case.architecture)
            back, info = kind.from_pretrained(folder / "ours", output_loading_info=True, **pooler)
    assert not said
    assert not any(info.values()), info
    assert back.dtype == theirs.dtype
    old, new = theirs.state_dict(), back.state_dict()
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert as_integers(tensor).equal(as_integers(new[name])), name


LIKE = [(family, names[0]) for family, names in ARCHITECTURES.items()]
LIKE += [("gpt2", "GPT2ForSequenceClassification"), ("bert", "BertForSequenceClassification")]


@pytest.mark.parametrize(("model_type", "architecture"), LIKE)
def test_a_config_comes_back_whole_where_it_is_told_from_where(
    hf, model_type, architecture, tmp_path
):
    """Special tokens, names of classes and what else says nothing of the computation."""
    from tests.interop.torch_models import torch_model

    names = {"id2label": {0: "bad", 1: "so so", 2: "good"}, "initializer_range": 0.5}
    special = {} if model_type == "vit" else {"pad_token_id": 3, "eos_token_id": 4}
    case = example(model_type, architecture)
    theirs = torch_model(dataclasses.replace(case, fields=case.fields | special))
    labels = {"label2id": {name: i for i, name in names["id2label"].items()}}
    if "Classification" in architecture:
        theirs.config.update(names | labels)
    theirs.save_pretrained(tmp_path / "theirs")
    save_pretrained(
        load_pretrained(tmp_path / "theirs"), tmp_path / "ours", like=tmp_path / "theirs"
    )
    old, new = (
        hf.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("theirs", "ours")
    )
    for fields in (old, new):
        del fields["_name_or_path"]
        fields.pop("classifier_dropout", None)  # ours writes out what it is by default
        if model_type == "mixtral":
            fields.pop("head_dim", None)  # which transformers does not derive
    told = [{n: v for n, v in fields.items() if v is not None} for fields in (old, new)]
    assert told[1] == told[0]


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_other_types_are_rounded_as_torch_rounds(source, target, tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle of rounding is PyTorch")
    case = example("opt", "OPTModel")
    random = np.random.default_rng(3)
    random_finite = lambda a: np.where(np.isfinite(a.astype(np.float32)), a, a.dtype.type(1.5))
    tensors = {
        name: random_finite(random_bits(random, array.shape, source))
        for name, array in saved(model_of_numbers(case.config), tmp_path / "names").items()
    }
    write_folder(tmp_path / "source", tensors, case.json)

    def check(found):
        assert found.keys() == tensors.keys()
        for name, array in tensors.items():
            wanted = as_torch(array).to(getattr(torch, target))
            assert torch.equal(as_torch(found[name]), wanted), name

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*become infinite", UserWarning)
        model = load_pretrained(tmp_path / "source", dtype=target)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {target}
        assert model.config.dtype == target
        check(saved(model, tmp_path / "at load"))
        check(saved(load_pretrained(tmp_path / "source"), tmp_path / "at save", dtype=target))
    fields = json.loads((tmp_path / "at save" / "config.json").read_text())
    assert fields["dtype"] == target
