"""``effscale.plan``: what it reads from a compiled step, what it makes of that, and what it refuses."""

import dataclasses
import json
import math

import jax
import pytest

from effscale.data_efficiency import DataEfficiencyConfig
from effscale.ltd import training_flops
from effscale.models import gpt2, num_params, preset
from effscale.moe import MoEConfig, with_experts
from effscale.parallel import MeshConfig
from effscale.parallel.machines import CHIPS, Machine, machine
from effscale.parallel.program_cost import link_speed
from effscale.plan import comparison, experiment, models, report, worker
from effscale.plan.cases import Case
from effscale.plan.config import PRESETS, Config
from effscale.plan.estimate import _attention, estimate
from effscale.plan.experiment import main
from effscale.plan.schedules import rounds, stages_of

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
    "processor_seconds": 1.0,
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
    sizes = dataclasses.asdict(MeshConfig(**{"data": 1, **mesh}))
    assert link_speed(sizes, machine(name), axes) == speed


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


def test_layouts_are_drawn_and_named_by_what_differs(tmp_path):
    other = dataclasses.replace(GPT2, accumulate=1, length=64)
    both = [estimate(GPT2, FOUND), estimate(other, {**FOUND, "total": 15e9})]
    assert [report.title(one, both) for one in both] == [
        "fsdp 4, tensor 2, 2 micro-batches, 32 tokens",
        "fsdp 4, tensor 2, 1 batch, 64 tokens",
    ]
    report.draw(tmp_path / "scale.png", PRESETS["smoke"], both)
    assert (tmp_path / "scale.png").stat().st_size > 10_000


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
    # The other layout was refused, and a figure of a single point compares nothing.
    assert not (tmp_path / "run" / "figures" / "scale.png").exists()
    told = (tmp_path / "run" / "report.md").read_text()
    assert "| fsdp 4, tensor 2, 1 batch |" in told
    assert "| gpt2-fsdp8-length256-accumulate1-full | it needs 17 GB |" in told


def test_nothing_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "compiled", lambda case: {"refused": "it needs 17 GB"})
    monkeypatch.setattr(experiment, "_check_compiler", lambda config: None)
    with pytest.raises(SystemExit):
        main(["--preset", "smoke", "--out", str(tmp_path / "run")])
    assert "gpt2-fsdp8-length256-accumulate1-full: it needs 17 GB" in capsys.readouterr().err


def test_names_of_machines():
    assert machine("v5p:8x8x8") == Machine(name="v5p:8x8x8", chip=CHIPS["v5p"], count=512)
    assert machine("4xH100").target.topology == "1x1x4"
    assert machine("v5e:16x16").target.topology == "v5e:16x16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"topology": "v5p:0x8x8"},
            "topology must be one of v5e:2x2, .*, v5p:8x8x8, .*384xH100.*, got 'v5p:0x8x8'",
        ),
        ({"topology": "v5p:8x8"}, "topology must be one of"),
        ({"topology": "v5p:3x3x3"}, "The first two sides of a TPU topology must be even"),
        ({"model": ("bert-large",)}, "length must be at most 512.*, got .2048,."),
        ({"model": ("gpt2",)}, "length must be at most 1024, the positions of gpt2.*, got .2048,."),
        (
            {"topology": "384xH100", "data": (3,), "tensor": (4,), "batch_size": 96},
            "48 rows can be divided among 96 devices",
        ),
        (
            {"topology": "v7x:8x8"},
            "topology must be one of v5e:2x2, .*, v5p:8x8x8, .*384xH100.*, got 'v7x:8x8'",
        ),
        ({"topology": "12xH100"}, "whole hosts of 8"),
        ({"model": ("bloom-175b",)}, "model=.*bloom"),
        ({"model": ("vit-base",)}, "model must be a text model"),
        (
            {"topology": "384xH100"},
            r"the mesh \(data 1, fsdp 96, expert 1, tensor 4\) does not divide the model bloom-176b: its width of 14336",
        ),
        (
            {"model": ("gpt3-1.3b",), "tensor": (32,)},
            "the model gpt3-1.3b: its heads of 16 is not a multiple of tensor=32",
        ),
        (
            {"model": ("gpt3-1.3b-moe-128",), "expert": (256,), "tensor": (1,)},
            "its experts of 128 is not a multiple of expert=256",
        ),
        ({"technique": ("random_ltd",)}, "none and other techniques to compare with it"),
        ({"technique": ("none", "onebit_adam")}, "above 1 for 1-bit optimizers"),
        ({"technique": ()}, "set, unless decode is"),
        (
            {"model": ("bert-large",), "length": (512,), "decode": ("int8",)},
            "bert-large is bidirectional",
        ),
        ({"decode": ("int8",), "decode_rows": 65}, "a multiple of the 128 replicas"),
        ({"length": (2048, 3000)}, "divisors of a step's 4,194,304 tokens"),
        ({"data_bandwidth": 0.0}, "above 0"),
        ({"tensor": (7,)}, "divides the 512 chips of v5p:8x8x8"),
        ({"accumulate": (3,)}, "a divisor of the 2048 rows"),
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


def here(monkeypatch):
    """Compiles for the eight devices of the tests."""
    target = type("Here", (), {"devices": staticmethod(jax.devices)})
    monkeypatch.setattr(Machine, "target", target)
    tiny = {"vocab_size": 64, "max_length": 128}
    monkeypatch.setitem(
        models.MODELS, "tiny", lambda: gpt2(num_layers=4, d_model=32, num_heads=2, **tiny)
    )


@pytest.mark.slow
def test_a_step_with_one_bit(monkeypatch):
    """Four workers of two devices: in one bit they send 1/32 of what they send in full, but for padding and scales."""
    here(monkeypatch)
    mesh = MeshConfig(data=4, fsdp=2)
    case = dataclasses.replace(
        GPT2, model="tiny", mesh=mesh, accumulate=1, technique="onebit_adam", remat="none"
    )
    found = worker.compile_case(case)
    full, one_bit = (estimate(case, found, branch=branch).sent_along("data") for branch in (0, 1))
    assert full > 2 * 3 / 4 * num_params(models.known_model("tiny")) / 2 * 4
    assert full / 32 < one_bit < full / 8
    assert found["optimizer"] > 3 * found["parameters"]  # two moments and what was left out


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_decoding(monkeypatch, weights):
    """Each of eight devices holds a half of the layers' weights, of one byte or two, and the cache of its rows and heads."""
    here(monkeypatch)
    case = dataclasses.replace(
        GPT2, model="tiny", mesh=MeshConfig(data=4, tensor=2), decode=weights, length=64
    )
    found = worker.compile_case(case)
    layers = 4 * 12 * 32 * 32 / 2
    rest = 64 * 32 / 2 + 128 * 32
    expected = (2 if weights == "bfloat16" else 1) * layers + 2 * rest
    assert expected < found["parameters"] < 1.5 * expected  # norms, biases and scales besides
    assert 2 * 4 * (8 / 4) * 64 * 32 / 2 * 2 < found["cache"] < 1.2 * 2 * 4 * 2 * 64 * 32 / 2 * 2
    one = estimate(case, found)
    assert one.compute == found["arguments"] / 819e9
    assert one.tokens_per_second[0] <= 8 / one.compute
    slower = estimate(case, {**found, "cycles": 3_000_000_000})
    assert slower.slowest == 2 + sum(one.network.values())


@pytest.mark.slow
def test_experts_are_exchanged(monkeypatch):
    """Tokens go to their experts and back, forward and backward, along the experts' axis alone."""
    here(monkeypatch)
    dense = models.MODELS["tiny"]()
    mixture = MoEConfig(num_experts=4, expert=dense.blocks[0].feed_forward)
    monkeypatch.setitem(models.MODELS, "tiny-moe", lambda: with_experts(dense, mixture))
    mesh = MeshConfig(data=2, expert=4)
    case = dataclasses.replace(GPT2, model="tiny-moe", mesh=mesh, accumulate=1, remat="none")
    one = estimate(case, worker.compile_case(case))
    # Each device has a row of 32 tokens, 3/4 of whose vectors of 32 numbers leave it, in 2 layers, there and back, twice.
    assert one.exchanged >= 3 / 4 * 32 * 32 * 2 * 2 * 2 * 2


def test_sizes_of_the_models():
    """As published: 1.3B+MoE-128 has 52 billion parameters, BERT-large 340 million with its head."""
    billions = lambda name: num_params(models.known_model(name)) / 1e9
    assert 51.5 < billions("gpt3-1.3b-moe-128") < 53
    assert 0.33 < billions("bert-large") < 0.345
    assert 174 < billions("gpt3-175b") < 176
    assert 65 < billions("opt-66b") < 67
    assert models.known_model("bert-large").causal is False


def test_the_papers_schedules():
    """Of layers' tokens random-LTD takes 69.7 % in as many steps as plain training has (Li et al., 2022, by its schedule of 16 tokens a stage)."""
    case = Case(
        model="gpt3-1.3b",
        topology="v5p:4x4x4",
        mesh=MeshConfig(data=2, fsdp=32),
        accumulate=1,
        remat="full",
        batch_size=512,
        length=2048,
    )
    steps = 286_102
    schedule = stages_of(case, "random_ltd", Config().efficiency, steps)
    kept = sum(
        share * (2 * 2048 + 22 * shape[1]) / 24 / 2048
        for shape, share in zip(schedule.shapes, schedule.shares(), strict=True)
    )
    assert abs(kept - 0.697) < 0.025  # here in steps of 128 tokens, which are rounded down
    assert schedule.chosen(3)[0] == (2048, 128)
    lengths = stages_of(case, "curriculum", Config().efficiency, steps)
    assert lengths.chosen(1) == [(80, 80)]
    assert math.isclose(sum(lengths.shares()), 1)
    assert math.isclose(sum(share for *_, share in rounds("zero_one_adam", 1520)), 1)


def test_means_over_a_schedule(tmp_path, monkeypatch):
    """Between stages that take 1 and 4 seconds the rest is interpolated; a 1-bit optimizer's steps are weighed by their shares."""

    def compiled(case):
        seconds = 4.0 if case.kept is None else 1.0 * case.kept / 64
        branches = [
            {"kind": "all-reduce", "axes": ["data"], "branch": 0, "times": 1, "sent": 32e9},
            {"kind": "all-gather", "axes": ["data"], "branch": 1, "times": 1, "sent": 1e9},
        ]
        rows = branches if "onebit" in case.technique else []
        return {
            **FOUND,
            "cycles": seconds * 1.5e9,
            "collectives": rows,
            "cache": 1e9,
            "accessed": 2e9,
        }

    monkeypatch.setattr(experiment, "compiled", compiled)
    monkeypatch.setattr(experiment, "_check_compiler", lambda config: None)
    config = Config(
        model=("gpt2",),
        topology="v5e:2x4",
        batch_size=8,
        length=(256,),
        data=(2,),
        tensor=(1,),
        accumulate=(1,),
        technique=("none", "random_ltd", "onebit_adam"),
        efficiency=DataEfficiencyConfig(dropping=1.0, min_kept=64, granularity=64),
        points=1,
        decode=("int8",),
        decode_rows=8,
        tokens=300.0 * 8 * 256,
        data_bandwidth=1e9,
        out=tmp_path / "run",
    )
    result = experiment.run(config)
    # 64, 128 and 192 tokens for a hundred steps each, between 1 second at 64 and 4 at 256: 1, 2 and 3.
    assert math.isclose(result.figures["gpt2_random_ltd_mean_step_seconds"], 2.0)
    transformer = models.known_model("gpt2")
    mean = sum(training_flops(transformer, 256, kept) for kept in (64, 128, 192)) * 8 / 3
    assert math.isclose(result.figures["gpt2_random_ltd_pflop"], mean / 1e15)
    warm_up = 23 / 152
    assert math.isclose(
        result.figures["gpt2_onebit_adam_gb_along_data"], 32 * warm_up + 1 - warm_up
    )
    assert result.figures["gpt2_onebit_adam_gb_along_data_one_bit"] == 1.0
    told = (tmp_path / "run" / "report.md").read_text()
    assert "| gpt2 | 1-bit Adam | uncompressed | 15.1 % |" in told
    assert "| gpt2 | int8 | data 8 |" in told
    rows = comparison.compared(config, {c.name: compiled(c) for c in config.cases()})
    assert [row.stage for row in rows if row.technique == "random_ltd"] == [
        "64 of 256 tokens",
        "mean",
    ]
