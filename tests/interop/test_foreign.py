"""Values of any kind in any field of a file from elsewhere: they are read, or one of our errors names them."""

import contextlib
import functools
import itertools
import json
import math
import random

import numpy as np
import pytest

from effscale.interop import FolderError, load_adapter, load_pretrained, load_tokenizer
from effscale.interop.companions import Companions
from effscale.interop.families import FAMILIES
from effscale.interop.foreign import Fields, reading
from effscale.interop.peft.config import other_kind, read_scaling
from effscale.interop.plan import parameters, plan, their_shapes
from effscale.interop.source import identify, open_source
from effscale.interop.summary import summarize
from effscale.interop.table import sizes
from effscale.models import abstract_model
from tests.interop.files import model_of_numbers, write_folder
from tests.interop.spaces import ARCHITECTURES, example

VALUES = (
    *(None, True, False, "", "8", "gelu", [], [8], [8, 8], [[8]], [None], {}, {"a": 1}, {"0": None}),
    *(0, 1, -1, 3, 8.0, 2.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *(10**9 + 1, 2**31, 2**63, 10**400, -(10**400)),
)  # fmt: skip
ROPE = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
COMMON = (
    *("model_type", "architectures", "id2label", "tie_word_embeddings", "quantization_config"),
    *("classifier_dropout", "hidden_dropout", "add_cross_attention", "is_decoder"),
    *("position_embedding_type", "max_position_embeddings", "original_max_position_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "rotary_pct", "partial_rotary_factor"),
    *("num_hidden_layers", "n_layer", "n_embed", "num_attention_heads", "pooler_output_size"),
)


@functools.cache
def case_of(model_type):
    return example(model_type, ARCHITECTURES[model_type][0])


def sample(model_type, count):
    """Some of all pairs of a field and a value, always the same."""
    return random.Random(0).sample(list(mutations(model_type)), count)


def mutations(model_type):
    """Every field of a family with every value."""
    fields = case_of(model_type).json
    for name in sorted({*FAMILIES[model_type].defaults, *fields, *COMMON}):
        yield from (fields | {name: value} for value in VALUES)
    if model_type in ("llama", "gpt_neox"):
        kinds = ({}, {"rope_type": "linear"}, {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4})  # fmt: skip
        ropes = [ROPE | kind for kind in kinds]
        names = ("rope_type", "type", "rope_theta", "factor", "truncate", "beta_fast", "mscale")
        names += ("attention_factor", "low_freq_factor", "partial_rotary_factor")
        for rope, name in itertools.product(ropes, (*names, *ROPE)):
            yield from (fields | {"rope_parameters": rope | {name: v}} for v in VALUES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_any_value_in_any_field_of_a_config(model_type):
    read = refused = 0
    for fields in sample(model_type, 300):
        try:
            identify(fields, {})
            FAMILIES[model_type].config(fields | {"add_pooling_layer": False}, {})
            read += 1
        except FolderError:
            refused += 1
    assert min(read, refused) > 50


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family."""
    found = {}
    for model_type in FAMILIES:
        case, folder = case_of(model_type), tmp_path_factory.mktemp(model_type)
        leaves = parameters(abstract_model(case.config))
        slots = plan(case.family.rules, case.config, leaves)
        shapes = their_shapes(slots, leaves, sizes(case.config))
        tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        found[model_type] = write_folder(folder, tensors, case.json)
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_folders_with_such_configs(model_type, folders):
    """The same through the files, and, as that traces the model, for a few to the comparison with the tensors."""
    folder, compared = folders[model_type], 0
    for fields in sample(model_type, 20):
        (folder / "config.json").write_text(json.dumps(fields))
        try:
            open_source(folder)
        except FolderError:
            continue
        if compared < 2:
            compared += 1
            assert summarize(folder)["family"] == model_type
    assert compared == 2


LAYERS = {m: "n_layer" if "n_layer" in f.defaults else "num_hidden_layers" for m, f in FAMILIES.items()}  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_layers_are_bounded_by_the_tensors(model_type, folders):
    folder = folders[model_type]
    more = {LAYERS[model_type]: 2_000_000_000, "scale_attn_by_inverse_layer_idx": True}
    (folder / "config.json").write_text(json.dumps(case_of(model_type).json | more))
    with pytest.raises(
        FolderError, match=r"must be at most the number of tensors, \d+, got 2000000000"
    ):
        open_source(folder)


def test_a_width_of_any_size_is_compared_with_the_tensors(folders):
    folder, fields = folders["gpt2"], case_of("gpt2").json
    (folder / "config.json").write_text(json.dumps(fields | {"n_embd": 2**31 - 2}))
    with pytest.raises(
        FolderError,
        match=r"wrong shape: wte\.weight \[31, 8\], but config\.json needs \[31, 2147483646\]",
    ):
        load_pretrained(folder)


def test_whole_numbers_may_have_a_point():
    for model_type, names in {
        "llama": ("hidden_size", "intermediate_size", "head_dim"),
        "gpt2": ("n_embd", "n_inner"),
        "vit": ("image_size", "patch_size"),
        "opt": ("word_embed_proj_dim",),
    }.items():
        for name in names:
            configs = [
                FAMILIES[model_type].config(
                    case_of(model_type).json | {name: kind(4), "add_pooling_layer": False}, {}
                )
                for kind in (int, float)
            ]
            assert configs[0] == configs[1]


NAMED = {
    "architectures": ("gpt2", {"architectures": 5}, "architectures must be a list of names.*, got 5"),
    "class": ("gpt2", {"architectures": {"a": 1}}, r"config\.json: architectures must be a list of names, got \{'a': 1\}"),
    "zero": ("llama", {"rope_parameters": ROPE | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings must be a whole number from 1.*, got 0"),
    "huge": ("gpt2", {"n_inner": 10**400}, r"config\.json: n_inner must be a whole number from 0 to 2147483647, got 100000000000000000\.\.\.0000000000000000000"),
    "label": ("llama", {"rope_parameters": ROPE | {"factor": "2"}}, r"config\.json, in rope_parameters: factor must be a finite number, got '2'"),
    "sizes": ("vit", {"image_size": []}, r"image_size must be a whole number.*, got \[\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_the_file_and_the_field_are_named(name):
    model_type, fields, message = NAMED[name]
    with pytest.raises(FolderError, match=message) as error:
        FAMILIES[model_type].config(case_of(model_type).json | fields, {})
    assert str(error.value).startswith("config.json")


def test_a_class_that_is_null_is_not_named(folders):
    fields = case_of("gpt2").json | {"architectures": [None]}
    assert identify(fields, {}) is FAMILIES["gpt2"]
    assert FAMILIES["gpt2"].config(fields, {}) == case_of("gpt2").config


def test_any_value_in_any_field_of_an_adapter():
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "peft_type")
    names += ("init_lora_weights", "use_dora", "layer_replication")
    read = 0
    for name, value, inner in itertools.product(names, VALUES, (False, True)):
        fields = {"peft_type": "LORA", name: {"q_proj": value} if inner else value}
        other_kind(fields)
        with contextlib.suppress(FolderError):
            assert math.isfinite(read_scaling(fields).scale_of("model.layers.0.q_proj"))
            read += 1
    assert read > 100


@pytest.mark.parametrize("name", ["id2label", "eos_token_id", "bos_token_id", "architectures"])
def test_any_value_in_a_config_that_another_is_like(name, folders, tmp_path):
    fields = case_of("gpt2").json
    (tmp_path / "out").mkdir()
    for value in VALUES:
        (tmp_path / "config.json").write_text(json.dumps(fields | {name: value}))
        with contextlib.suppress(FolderError):
            Companions(fields, tmp_path, None).write(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"


def test_names_that_are_too_long_for_the_file_system(folders, tmp_path):
    long = "x" * 5000
    model = model_of_numbers(case_of("gpt2").config)
    for read in (
        load_pretrained,
        load_tokenizer,
        summarize,
        functools.partial(load_adapter, model),
    ):
        with pytest.raises(FolderError, match="there is no folder"):
            read(tmp_path / long)
    with pytest.raises(FolderError, match="there is no folder"):
        Companions(case_of("gpt2").json, tmp_path / long, None)
    write_folder(tmp_path / "a", {"w": np.zeros(1, np.float32)}, case_of("gpt2").json)
    (tmp_path / "a" / "model.safetensors").unlink()
    index = {"weight_map": {"w": f"{long}.safetensors"}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        FolderError, match=r"model\.safetensors\.index\.json': 1 of its 1 files are missing:"
    ):
        load_pretrained(tmp_path / "a")


def test_the_guard_lets_through_what_is_no_fault_of_a_value():
    with pytest.raises(MemoryError), reading("it"):
        raise MemoryError
    with pytest.raises(FolderError, match=r"^it: ZeroDivisionError"), reading("it"):
        Fields("here", {"a": 1}).whole("a") / 0
