"""Files of experts that are not whole, not alike or not to be trusted."""

import os
import shutil

import numpy as np
import pytest

from effscale.interop import (
    FolderError,
    read_deepspeed_experts,
    read_deepspeed_rest,
    write_deepspeed_experts,
)

torch = pytest.importorskip("torch", reason="DeepSpeed's files are PyTorch's")
from tests.moe import deepspeed_oracle as oracle  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    oracle.save(oracle.net(), tmp_path, ep_size=2)
    return tmp_path


def expert_path(folder, layer, expert):
    return folder / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("layer", "expert", "message"),
    [
        (1, 4, r"layer_1_expert_4_mp_rank_00_model_states.pt': is missing, .* up to 11"),
        (1, 11, r"files of 11 experts of 'second.0', and its router is one of the shape \[12, 6\]"),
    ],
)
def test_a_missing_expert_is_named(folder, layer, expert, message):
    expert_path(folder, layer, expert).unlink()
    with pytest.raises(FolderError, match=message):
        read_deepspeed_experts(folder)


def test_a_missing_layer_is_named(folder):
    for path in folder.glob("layer_1_*"):
        path.rename(folder / path.name.replace("layer_1", "layer_2"))
    with pytest.raises(FolderError, match="lacks the expert files of layer 1"):
        read_deepspeed_experts(folder)
    for path in folder.glob("layer_2_*"):
        path.unlink()
    with pytest.raises(FolderError, match=r"files of 0 experts of 'second\.0'"):
        read_deepspeed_experts(folder)


def change(path, edit):
    state = torch.load(path, weights_only=True)
    torch.save(edit(state), path)


BIAS = "second.0.deepspeed_moe.experts.deepspeed_experts.3.dense_h_to_4h.bias"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s | {BIAS: torch.ones(3)}, r"of layer 1 differ: .*bias float32 \[10\]"),
        (lambda s: s | {BIAS: s[BIAS].half()}, "of layer 1 differ"),
        (lambda s: {n: w for n, w in s.items() if n != BIAS}, "of layer 1 differ"),
        (lambda s: {}, "of layer 1 differ.*nothing"),
        (lambda s: s | {BIAS.replace("3", "2"): s[BIAS]}, "is not a tensor of expert 3"),
        (lambda s: s | {"extra": s[BIAS]}, "'extra' is not a tensor of expert 3"),
        (lambda s: s | {BIAS.replace("second", "first"): s[BIAS]}, "contain experts of .'first'"),
        (lambda s: s | {BIAS: torch.ones(1).expand(10**9)}, "is smaller than its tensors"),
    ],
)
def test_experts_that_are_not_alike_are_refused(folder, edit, message):
    change(expert_path(folder, 1, 3), edit)
    with pytest.raises(FolderError, match=message):
        read_deepspeed_experts(folder)


def test_several_tensor_parallel_ranks_are_refused(folder):
    path = expert_path(folder, 0, 0)
    shutil.copy(path, folder / path.name.replace("rank_00", "rank_01"))
    with pytest.raises(FolderError, match=r"tensor-parallel ranks \[0, 1\]"):
        read_deepspeed_experts(folder)


def test_a_wrong_folder_is_refused(tmp_path):
    with pytest.raises(FolderError, match="no files layer_L_expert_G"):
        read_deepspeed_experts(tmp_path)
    with pytest.raises(FolderError, match="there is no folder"):
        read_deepspeed_experts(tmp_path / "absent")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "name", ["layer_0_expert_1_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt"]
)
def test_a_hostile_pickle_is_refused_and_not_run(folder, name):
    state = torch.load(folder / name, weights_only=True)
    torch.save(state | {"args": Hostile(os.fspath(folder / "ran"))}, folder / name)
    with pytest.raises(FolderError, match=r"its pickle refers to 'posix\.mkdir'"):
        read_deepspeed_experts(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "has no state dict under 'module'"),
        ({"a": {"a": 1.0}}, r"contains more than tensors: 'a.a' \(float\)"),
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "contains 'a.b' twice"),
        ({"a": torch.ones(1).expand(10**9)}, "smaller than its tensor 'a'"),
    ],
)
def test_a_strange_state_dict_is_refused(folder, module, message):
    torch.save({"module": module}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(FolderError, match=message):
        read_deepspeed_rest(folder)


def test_a_state_dict_within_itself_is_refused(folder):
    module = {}
    module["a"] = module["b"] = {"c": torch.ones(1)}
    torch.save({"module": module}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(FolderError, match="nested too deeply, or contains itself"):
        read_deepspeed_rest(folder)


def test_what_cannot_be_written_is_refused(folder):
    experts = read_deepspeed_experts(folder)
    with pytest.raises(FolderError, match="already contains expert files"):
        write_deepspeed_experts(folder, experts)
    unequal = {"moe": {"up": np.ones((2, 3)), "down": np.ones((3, 3))}}
    with pytest.raises(ValueError, match=r"arrays of experts\['moe'\] must all have .*got shapes"):
        write_deepspeed_experts(folder / "new", unequal)
    gate = {"first.deepspeed_moe.gate.wg.weight": np.ones((3, oracle.D))}
    with pytest.raises(ValueError, match=r"the router of 'first' must have .*got shape \(3, 6\)"):
        write_deepspeed_experts(folder / "new", experts, gate)
    assert not (folder / "new").exists()
