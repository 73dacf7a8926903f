import copy

import pytest

from effscale.interop.deepspeed.random_ltd import random_ltd_from_deepspeed
from effscale.ltd import RandomLTD, mslg

CONFIG = {
    "train_batch_size": 512,
    "data_efficiency": {
        "enabled": True,
        "seed": 1234,
        "data_routing": {
            "enabled": True,
            "random_ltd": {
                "enabled": True,
                "total_layer_num": 24,
                "random_ltd_layer_num": 22,
                "random_ltd_layer_id": list(range(1, 23)),
                "model_mask_name": "attention_mask",
                "model_type": "decoder",
                "hidden_state_order": "seq_batch_dim",
                "random_ltd_schedule": {
                    "min_value": 128,
                    "max_value": 2048,
                    "schedule_type": "fixed_linear",
                    "schedule_config": {"require_steps": 2e5, "seq_per_step": 16},
                },
            },
        },
    },
}


def changed(**changes):
    """A configuration with other values at ``block__key``s below ``random_ltd``; None removes a key."""
    config = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        block = config["data_efficiency"]["data_routing"]["random_ltd"]
        *above, key = path.split("__")
        for name in above:
            block = block[name]
        if value is None:
            del block[key]
        else:
            block[key] = value
    return config


def test_the_gpt_recipe():
    wanted = mslg(min_value=128, max_value=2048, require_steps=200_000, seq_per_step=16)
    found = random_ltd_from_deepspeed(CONFIG)
    assert found == RandomLTD(pacing=wanted, layers=tuple(range(1, 23)))


def test_off_is_off_and_contradictions_are_errors():
    assert random_ltd_from_deepspeed(changed(enabled=False)) is None
    assert random_ltd_from_deepspeed({"data_efficiency": {"enabled": True}}) is None
    config = copy.deepcopy(CONFIG)
    config["data_efficiency"]["data_routing"]["enabled"] = False
    with pytest.raises(
        ValueError, match=r"data_routing\.enabled is false, but .*random_ltd\.enabled"
    ):
        random_ltd_from_deepspeed(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"random_ltd_layer_num": 21}, "random_ltd_layer_num must be 22, .*, got 21"),
        (
            {"total_layer_num": 20},
            r"random_ltd_layer_id must be .* with total_layer_num=20, got \[20, 21, 22\]",
        ),
        ({"layer_token_lr_schedule": {"enabled": True}}, 'unit="tokens"'),
        (
            {"random_ltd_schedule__schedule_type": "fixed_root"},
            "schedule_type must be one of 'fixed_linear', got 'fixed_root'",
        ),
        ({"random_ltd_schedule__max_value": 64}, r"max_difficulty must be .*, got 64"),
    ],
)
def test_errors_name_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        random_ltd_from_deepspeed(changed(**changes))
