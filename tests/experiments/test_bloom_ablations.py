"""The experiment ``bloom_ablations``: what each arm is, that only that differs, and what a run leaves."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from effscale.experiments.bloom_ablations import PRESETS, main
from effscale.experiments.bloom_ablations.config import ARMS
from effscale.models.positions import Alibi, LearnedPositions, Rotary
from effscale.parallel import MeshConfig


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run of two arms on one device, which compiles faster than on eight."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    build = MeshConfig.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeshConfig, "build", lambda mesh: build(mesh, jax.devices()[:1]))
        main(
            [
                *("--preset", "smoke", "--corpus", corpus, "--vocab-size", "320"),
                *("--validation-fraction", "0.1", "--arms", "alibi", "learned"),
                *("--model.d-model", "16", "--length", "16", "--out", str(folder)),
                *("--cache", str(tmp_path_factory.mktemp("cache")), "--search.points", "1"),
            ]
        )
    return folder


def test_arms_differ_in_what_they_are_about_alone():
    config = PRESETS["default"]
    built = {arm: config.pretraining(arm).model.build(300, config.length) for arm in ARMS}
    kinds = {
        "alibi": Alibi,
        "rotary": Rotary,
        "learned": LearnedPositions,
        "alibi_without_norm": Alibi,
    }
    for arm, model in built.items():
        assert isinstance(model.positions, kinds[arm])
        assert (model.inputs.norm is None) == (arm == "alibi_without_norm")
        same = dataclasses.replace(
            model, positions=built["alibi"].positions, inputs=built["alibi"].inputs
        )
        assert same == built["alibi"]
    assert built["learned"].positions.num == 512
    runs = [dataclasses.replace(config.pretraining(arm), model=config.model) for arm in ARMS]
    assert all(run == runs[0] for run in runs)


def test_what_a_run_leaves(finished):
    named = json.loads((finished / "results.json").read_text())
    for arm in ("alibi", "learned"):
        assert np.isfinite(
            [named[f"{arm}_val_loss"], named[f"{arm}_val_loss_2_times_longer"]]
        ).all()
    losses = named["seeds"]["alibi_val_loss"]
    assert losses == [named["alibi_val_loss"]]
    assert (finished / "figures" / "bloom_ablations.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--arms", "rotary"), "arms"),
        (("--times-longer", "2", "1"), "times_longer"),
        (("--arms", "alibi", "sinusoidal"), "sinusoidal"),
    ],
)
def test_what_cannot_be_compared_is_refused(capsys, change, message):
    with pytest.raises(SystemExit) as refused:
        main(["--preset", "smoke", *change])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
