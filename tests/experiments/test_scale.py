"""The experiment ``scale``: what it reads from a compiled step, what it makes of that, and what it refuses."""

import dataclasses
import json
import math

import jax
import pytest

from effscale.experiments.scale import Config, experiment, main, report, worker
from effscale.experiments.scale.config import Case
from effscale.experiments.scale.estimate import _attention, _speed, estimate
from effscale.experiments.scale.machines import CHIPS, Machine, machine
from effscale.ltd import training_flops
from effscale.models import num_params, preset
from effscale.parallel import MeshConfig

GPT2 = Case(
    model="pythia-70m",
    topology="v5e:2x4",
    mesh=MeshConfig(data=1, fsdp=4, tensor=2),
    accumulate=2,
    remat="full",
    batch_size=8,
    length=32,
)
FOUND = {
    "trace_seconds": 1.0,
    "compile_seconds": 2.0,
    "parameters": 4e9,
    "optimizer": 8e9,
    "arguments": 12e9,
    "temporaries": 2e9,
    "total": 14e9,
    "operations": 1.0,
    "cycles": 3_000_000_000,
    "kernels": 0,
    "collectives": [
        {"kind": "all-gather", "axes": ["fsdp"], "times": 3, "sent": 100e9},
        {"kind": "all-reduce", "axes": ["tensor"], "times": 3, "sent": 300e9},
    ],
}


@pytest.fixture(scope="module")
def found():
    """What the worker reads from the step that XLA compiles for the eight devices of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        target = type("Here", (), {"devices": staticmethod(jax.devices)})
        patch.setattr(Machine, "target", target)
        return worker.compile_case(GPT2)


def test_parameters_are_divided(found):
    whole = num_params(preset("pythia-70m")) * 4
    # Norms and biases are whole along one of the axes.
    assert whole / 8 <= found["parameters"] < whole / 8 * 1.1
    assert 2 * found["parameters"] <= found["optimizer"] < 2 * found["parameters"] + 100
    assert found["arguments"] > found["parameters"] + found["optimizer"]
    assert found["total"] > found["arguments"]


def test_traffic_goes_along_the_axes(found):
    along = {"+".join(row["axes"]) for row in found["collectives"]}
    assert {"fsdp", "tensor"} <= along
    # Each layer's weights are gathered twice in each of two micro-batches, one to read and one to learn, and a half of them goes along.
    gathered = sum(
        row["sent"]
        for row in found["collectives"]
        if row["axes"] == ["fsdp"] and row["kind"] == "all-gather"
    )
    layers = preset("pythia-70m").groups[0].repeat
    assert gathered > layers * 2 * 2 * (512 * 512 * 12 / 2) * 3 / 4
    assert json.loads(json.dumps(found)) == found


def test_what_the_figures_mean():
    """By hand: two seconds of cycles; half a second along fsdp and one and a half along tensor."""
    one = estimate(GPT2, FOUND)
    assert one.compute == 3e9 / 1.5e9
    assert one.network == {"fsdp": 100e9 / 200e9, "tensor": 300e9 / 200e9}
    assert (one.fastest, one.slowest) == (2.0, 4.0)
    operations = 8 * training_flops(GPT2.transformer(), 32)
    assert math.isclose(one.mfu[0], operations / (8 * 197e12) / 4)
    assert one.tokens_per_second == (8 * 32 / 4, 8 * 32 / 2)
    assert one.fits
    assert estimate(GPT2, {**FOUND, "total": 15.7 * 2**30}).fits
    assert not estimate(GPT2, {**FOUND, "total": 17e9}).fits


def test_fused_attention_is_added_at_the_peak():
    """Of 6 layers, 512 wide: two products of length x length x 512 for a row, four and a half times in all."""
    one = estimate(GPT2, {**FOUND, "kernels": 9})
    operations = 8 * 6 * 4.5 * 2 * 2 * 32 * 32 * 512
    assert math.isclose(one.compute, 2 + operations / (8 * 197e12), rel_tol=1e-12)
    assert math.isclose(_attention(GPT2), operations)


def test_gpus_are_reckoned_by_their_peak_and_the_way_between_hosts():
    case = dataclasses.replace(GPT2, topology="16xH100", mesh=MeshConfig(data=1, fsdp=8, tensor=2))
    one = estimate(case, {**FOUND, "cycles": 0})
    operations = 8 * training_flops(case.transformer(), 32)
    assert math.isclose(one.compute, 4 / 3 * operations / (16 * 989e12))
    assert one.network == {"fsdp": 100e9 / 50e9, "tensor": 300e9 / 450e9}


@pytest.mark.parametrize(
    ("name", "mesh", "axes", "speed"),
    [
        ("8xH100", {"fsdp": 8}, ["fsdp"], 450e9),
        ("16xH100", {"fsdp": 4, "tensor": 4}, ["tensor"], 450e9),
        ("16xH100", {"fsdp": 4, "tensor": 4}, ["fsdp"], 50e9),
        ("24xH100", {"fsdp": 4, "tensor": 6}, ["tensor"], 50e9),  # some groups lie in two hosts
        ("16xH100", {"data": 2, "fsdp": 4, "tensor": 2}, ["fsdp", "tensor"], 450e9),
        ("v5e:4x4", {"fsdp": 16}, ["fsdp"], 200e9),
    ],
)
def test_how_near_chips_are(name, mesh, axes, speed):
    case = dataclasses.replace(GPT2, topology=name, mesh=MeshConfig(**{"data": 1, **mesh}))
    assert _speed(case, machine(name), axes) == speed


def test_the_front_of_memory_and_time():
    more = {**FOUND, "total": 15e9}
    slower = {**FOUND, "cycles": 6_000_000_000}
    both = {**more, "cycles": 6_000_000_000}
    faster = {**more, "cycles": 1_500_000_000}
    every = [estimate(GPT2, one) for one in (FOUND, slower, both, faster)]
    assert report.pareto(every) == [every[0], every[3]]
    assert report.best(every) is every[3]
    large = [estimate(GPT2, {**FOUND, "total": size}) for size in (19e9, 18e9)]
    assert report.best(large) is large[1]


def test_a_run_and_its_continuation(tmp_path, monkeypatch):
    """Finished cases are kept; what is shown has all of them."""
    calls = []

    def compiled(case):
        calls.append(case.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return FOUND if case.mesh.tensor > 1 else {"refused": "it needs 17 GB"}

    monkeypatch.setattr(experiment, "compiled", compiled)
    monkeypatch.setattr(experiment, "_check_compiler", lambda config: None)
    options = ["--preset", "smoke", "--tensor", "1", "2", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main(options)
    main(["--out", str(tmp_path / "run"), "--resume"])
    assert calls == [calls[0], calls[1], calls[1]]
    named = json.loads((tmp_path / "run" / "results.json").read_text())
    assert named["gpt2_gb_per_chip"] == 14.0
    assert named["gpt2_compile_seconds"] == 2.0
    assert (tmp_path / "run" / "figures" / "scale.png").stat().st_size > 10_000
    told = (tmp_path / "run" / "report.md").read_text()
    assert "gpt2-fsdp4-tensor2-accumulate1-full" in told
    assert "| gpt2-fsdp8-accumulate1-full | it needs 17 GB |" in told


def test_nothing_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "compiled", lambda case: {"refused": "it needs 17 GB"})
    monkeypatch.setattr(experiment, "_check_compiler", lambda config: None)
    with pytest.raises(SystemExit):
        main(["--preset", "smoke", "--out", str(tmp_path / "run")])
    assert "gpt2-fsdp8-accumulate1-full: it needs 17 GB" in capsys.readouterr().err


def test_names_of_machines():
    assert machine("v5p:8x8x8") == Machine(name="v5p:8x8x8", chip=CHIPS["v5p"], count=512)
    assert machine("4xH100").target.topology == "1x1x4"
    assert machine("v5e:16x16").target.topology == "v5e:16x16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topology": "v5p:0x8x8"}, "no side may be 0"),
        ({"topology": "v5p:8x8"}, "a TPU's kind and sides"),
        ({"model": ("bert-large",)}, "causal language models"),
        ({"model": ("gpt2",)}, "length=2048: must be at most 1024, the positions of gpt2"),
        (
            {"topology": "384xH100", "tensor": (2, 3), "batch_size": 384, "accumulate": (2,)},
            "192 rows can be divided among 128 devices",
        ),
        (
            {"topology": "v7x:8x8"},
            "topology='v7x:8x8': must be a TPU's kind and sides, such as v5p:8x8x8.*384xH100",
        ),
        ({"topology": "12xH100"}, "whole hosts of 8"),
        ({"model": ("bloom-175b",)}, "model=.*bloom"),
        ({"model": ("vit-base",)}, "causal language models"),
        ({"tensor": (7,)}, "divides the 512 chips of v5p:8x8x8"),
        ({"accumulate": (3,)}, "a divisor of batch_size=2048"),
        ({"batch_size": 128}, "64 rows can be divided among 128 devices"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)


def test_without_the_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "run")])
    assert "pip install --no-deps --requirement aot-requirements.txt" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
