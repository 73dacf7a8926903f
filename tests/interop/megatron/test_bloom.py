"""Tensor-parallel BLOOM files, split here by the rule that Megatron follows, and put together again."""

import shutil

import ml_dtypes
import numpy as np
import pytest

from effscale.interop.folder import open_tensors
from effscale.interop.megatron.bloom import MegatronBloom
from effscale.interop.tensors import FolderError, Tensors

torch = pytest.importorskip("torch", reason="Megatron's files are PyTorch's")

LAYERS, HEADS, HEAD_DIM, VOCABULARY = 2, 4, 3, 16
D = HEADS * HEAD_DIM


def full_state(dtype):
    """A BLOOM state dict under Hugging Face's names."""
    rng = np.random.default_rng(0)
    shapes = {
        "word_embeddings.weight": (VOCABULARY, D),
        "word_embeddings_layernorm": D,
        "ln_f": D,
    }
    for i in range(LAYERS):
        shapes |= {
            f"h.{i}.input_layernorm": D,
            f"h.{i}.self_attention.query_key_value": (3 * D, D),
            f"h.{i}.self_attention.dense": (D, D),
            f"h.{i}.post_attention_layernorm": D,
            f"h.{i}.mlp.dense_h_to_4h": (4 * D, D),
            f"h.{i}.mlp.dense_4h_to_h": (D, 4 * D),
        }
    state = {}
    for name, shape in shapes.items():
        if name.endswith(".weight"):
            state[name] = rng.normal(size=shape)
            continue
        shape = (shape,) if isinstance(shape, int) else shape
        state[f"{name}.weight"] = rng.normal(size=shape)
        state[f"{name}.bias"] = rng.normal(size=shape[:1])
    return {name: array.astype(dtype) for name, array in state.items()}


def part(name, array, rank, ranks):
    """What a rank holds of a tensor."""
    if "layernorm" in name or name.startswith("ln_f"):
        return array
    if "self_attention.query_key_value" in name:  # whole heads, each with its query, key and value
        heads = array.reshape(HEADS, 3, HEAD_DIM, *array.shape[1:])
        mine = heads[rank * HEADS // ranks : (rank + 1) * HEADS // ranks]
        return mine.reshape(-1, *array.shape[1:])
    if "dense_h_to_4h" in name or "word_embeddings" in name:  # outputs; words
        size = len(array) // ranks
        return array[rank * size : (rank + 1) * size]
    if name.endswith(".bias"):  # added once, after the sum over ranks
        return array
    size = array.shape[1] // ranks  # inputs
    return array[:, rank * size : (rank + 1) * size]


def layer_and_name(name):
    if name.startswith("h."):
        _, block, rest = name.split(".", 2)
        return 3 + int(block), rest
    if name.startswith("ln_f"):
        return 3 + LAYERS + 1, name.removeprefix("ln_f.")
    return 1, name.replace("word_embeddings_layernorm", "word_embeddings.norm")


def as_torch(array):
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def write_shards(folder, state, ranks, change=lambda layer, rank, tensors: tensors):
    files = {}
    for name, array in state.items():
        layer, old = layer_and_name(name)
        for rank in range(ranks):
            files.setdefault((layer, rank), {})[old] = part(name, array, rank, ranks)
    for (layer, rank), tensors in files.items():
        tensors = {name: as_torch(array) for name, array in change(layer, rank, tensors).items()}
        torch.save(tensors, folder / f"layer_{layer:02}-model_{rank:02}-model_states.pt")
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"not looked at")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_parts_make_the_whole(tmp_path, ranks, dtype):
    state = full_state(dtype)
    write_shards(tmp_path, state, ranks)
    tensors = open_tensors(tmp_path)
    assert isinstance(tensors, MegatronBloom)
    assert isinstance(tensors, Tensors)
    assert tensors.infos.keys() == state.keys()
    for name, expected in state.items():
        array = tensors.read(name)
        assert tensors.infos[name].shape == array.shape == expected.shape
        assert tensors.infos[name].dtype == array.dtype == expected.dtype
        assert array.tobytes() == expected.tobytes(), name
    with pytest.raises(FolderError, match=r"no tensor 'h.9.mlp'"):
        tensors.read("h.9.mlp")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_drifted_apart_is_averaged(tmp_path, dtype):
    state = full_state(dtype)
    drifted = {"input_layernorm.weight", "self_attention.dense.bias", "mlp.dense_4h_to_h.bias"}

    def drift(layer, rank, tensors):
        return {
            name: array + np.asarray(rank, dtype) if name in drifted else array
            for name, array in tensors.items()
        }

    write_shards(tmp_path, state, 4, drift)
    tensors = MegatronBloom(tmp_path)
    for name, expected in state.items():
        array = tensors.read(name)
        if name.split(".", 2)[-1] in drifted:
            held = [expected + np.asarray(rank, dtype) for rank in range(4)]
            mean = sum(part.astype(np.float64) for part in held) / 4
            assert array.tobytes() == mean.astype(dtype).tobytes(), name
        else:
            assert array.tobytes() == expected.tobytes(), name


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path, full_state(np.float32), 2)
    return tmp_path


def change(folder, layer, rank, edit):
    path = folder / f"layer_{layer:02}-model_{rank:02}-model_states.pt"
    tensors = torch.load(path, weights_only=True)
    edit(tensors)
    torch.save(tensors, path)


def test_a_missing_rank_is_named(folder):
    (folder / "layer_03-model_01-model_states.pt").unlink()
    (folder / "layer_04-model_00-model_states.pt").unlink()
    with pytest.raises(FolderError, match=r"lacks .*: rank 1 of layer 3, rank 0 of layer 4"):
        MegatronBloom(folder)


def test_a_missing_block_is_named(folder):
    for rank in (0, 1):
        (folder / f"layer_03-model_0{rank}-model_states.pt").unlink()
    with pytest.raises(FolderError, match=r"lacks the files of layers \[3\], blocks \[0\]"):
        MegatronBloom(folder)


def test_ranks_that_disagree_are_named(folder):
    name = "mlp.dense_h_to_4h.bias"
    change(folder, 3, 1, lambda tensors: tensors.update({name: torch.ones(5)}))
    message = (
        r"'mlp.dense_h_to_4h.bias' is float32 \(24,\) in '.*_00-.*' and float32 \(5,\) in '.*_01-"
    )
    with pytest.raises(FolderError, match=message):
        MegatronBloom(folder)
    change(folder, 3, 1, lambda tensors: tensors.update({name: torch.ones(24).half()}))
    with pytest.raises(FolderError, match=r"float16 \(24,\) in"):
        MegatronBloom(folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_tensor_that_one_rank_lacks_is_named(folder, rank):
    change(folder, 4, rank, lambda tensors: tensors.pop("mlp.dense_h_to_4h.bias"))
    with pytest.raises(
        FolderError, match=rf"layer_04-model_0{rank}.*lacks 'mlp.dense_h_to_4h.bias'"
    ):
        MegatronBloom(folder)


def test_unknown_names_are_named(folder):
    for rank in (0, 1):
        change(folder, 4, rank, lambda tensors: tensors.update({"mlp.gate.weight": torch.ones(2)}))
    with pytest.raises(FolderError, match=r"layer_04.*'mlp.gate.weight' is not a tensor of BLOOM"):
        MegatronBloom(folder)


def test_a_kernel_of_one_dimension_cannot_be_joined(folder):
    for rank in (0, 1):
        edit = {"mlp.dense_4h_to_h.weight": torch.ones(2)}
        change(folder, 4, rank, lambda tensors, edit=edit: tensors.update(edit))
    with pytest.raises(
        FolderError,
        match=r"layer_04-model_00-model_states\.pt': 'mlp\.dense_4h_to_h\.weight' has the invalid shape \(2,\)\.",
    ):
        MegatronBloom(folder)


def test_a_tensor_in_two_layers(folder):
    for rank in (0, 1):
        copy = folder / f"layer_07-model_0{rank}-model_states.pt"
        shutil.copy(folder / f"layer_01-model_0{rank}-model_states.pt", copy)
    with pytest.raises(FolderError, match=r"has 'word_embeddings\.weight' in two layers\."):
        MegatronBloom(folder)


def test_a_damaged_or_hostile_file_is_refused(folder):
    path = folder / "layer_04-model_01-model_states.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        FolderError,
        match=r"layer_04-model_01-model_states\.pt': is not a valid PyTorch file of weights",
    ):
        MegatronBloom(folder)


def test_a_folder_without_layer_files(tmp_path):
    with pytest.raises(
        FolderError, match="lacks layer files of Megatron-DeepSpeed: none was found"
    ):
        MegatronBloom(tmp_path)
