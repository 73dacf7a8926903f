"""What crosses between TPU slices, from the program that the real compiler makes for them."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("onebit_across_slices.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu; pip install --no-deps -r aot-requirements.txt",
    ),
]


def compiled(slices):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(slices)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_compressed_steps_of_four_workers_in_a_v5p_4x4x4():
    """In the branch of compressed steps bytes cross, and no floats but scales and what tensor sharding asks for."""
    program = compiled(1)
    # skip_nonfinite and the step's own check are around the optimizer's: the last branch is the stage.
    last = lambda stage: [c for c in program["collectives"] if c[4][1:] == [1, stage]]
    warm_up, compressed = last(0), last(1)
    shard = 4 * program["parameters"] / 16  # fsdp 4 x tensor 4
    assert max(size for _, types, size, _, _ in warm_up if types == ["f32"]) > shard / 10
    sent = [(kind, size) for kind, types, size, _, _ in compressed if types == ["u8"]]
    assert {kind for kind, _ in sent} >= {"all-to-all"}
    assert sum(size for kind, size in sent if kind == "all-to-all") < shard / 20
    assert all(size < shard / 100 for _, types, size, _, _ in compressed if types != ["u8"])


def test_what_two_slices_send():
    """The gradient in floats once, for the warm-up; signs in bytes; and single numbers."""
    sends = compiled(2)["sends"]
    floats = [(name, size) for name, dtype, size in sends if dtype == "f32" and size > 1024]
    signs = [(name, size) for name, dtype, size in sends if dtype == "u8"]
    assert not any(name.startswith("all_to_all") for name, _ in floats)
    assert any(name.startswith("all_to_all") for name, _ in signs)
    assert sum(size for _, size in signs) < 4 * sum(size for _, size in floats) / 25
