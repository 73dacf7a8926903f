"""DeepSpeed's configurations, those of its BERT examples among them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effscale.interop import optimizer_from_deepspeed
from effscale.optim import onebit_adam, onebit_lamb, zero_one_adam
from effscale.training import Clip

BERT = {
    "train_batch_size": 4096,
    "gradient_clipping": 1.0,
    "fp16": {"enabled": True},
    "optimizer": {
        "type": "OneBitAdam",
        "params": {
            "lr": 4e-4,
            "weight_decay": 0.01,
            "bias_correction": False,
            "freeze_step": 3,
            "comm_backend_name": "nccl",
            "cuda_aware": False,
        },
    },
}


def assert_same(a, b):
    """Two optimizers do the same for some steps."""
    params = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)}
    found = []
    for optimizer in (a, b):
        p, state = params, optimizer.init(params)
        for i in range(6):
            gradients = jax.tree.map(lambda x, i=i: jnp.sin(3 * x + i), p)
            updates, state = optimizer.update(gradients, state, p)
            p = optax.apply_updates(p, updates)
        found.append(p)
    np.testing.assert_allclose(found[0]["w"], found[1]["w"], rtol=1e-6)


def with_optimizer(kind, **params):
    return BERT | {"optimizer": {"type": kind, "params": params}}


def test_onebit_adam():
    assert_same(
        optimizer_from_deepspeed(BERT),
        onebit_adam(4e-4, weight_decay=0.01, freeze_step=3, clip=Clip(1.0, by="local")),
    )


def test_zero_one_adam():
    config = with_optimizer(
        "ZeroOneAdam", lr=1e-3, var_freeze_step=2, local_step_scaler=1, local_step_clipper=2, var_update_scaler=1
    )  # fmt: skip
    expected = zero_one_adam(
        1e-3, var_freeze_step=2, local_step_scaler=1, local_step_clipper=2, var_update_scaler=1,
        clip=Clip(1.0, by="local"),
    )  # fmt: skip
    assert_same(optimizer_from_deepspeed(config), expected)


def test_onebit_lamb():
    config = with_optimizer(
        "OneBitLamb", lr=11e-3, betas=[0.9, 0.99], max_coeff=0.3, min_coeff=0.01, freeze_step=3, weight_decay=0.01
    )  # fmt: skip
    expected = onebit_lamb(
        11e-3, 0.9, 0.99, weight_decay=0.01, max_coeff=0.3, min_coeff=0.01, freeze_step=3,
        clip=Clip(1.0, by="local"),
    )  # fmt: skip
    assert_same(optimizer_from_deepspeed(config), expected)


def test_without_params():
    config = {"optimizer": {"type": "OneBitAdam", "params": None}}
    assert_same(optimizer_from_deepspeed(config), onebit_adam(1e-3))


def test_a_schedule_takes_the_place_of_the_rate():
    schedule = optax.linear_schedule(0.0, 1e-3, 4)
    assert_same(
        optimizer_from_deepspeed(BERT, schedule, weight_decay=0.0),
        onebit_adam(schedule, freeze_step=3, clip=Clip(1.0, by="local")),
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "needs optimizer"),
        ({"optimizer": {"type": "OnebitAdm"}}, "did you mean 'OneBitAdam'"),
        (
            with_optimizer("OneBitAdam", amsgrad=True),
            "amsgrad must be one of False.*, got True.*no AMSGrad",
        ),
        (
            with_optimizer("OneBitAdam", max_grad_norm=1.0),
            "max_grad_norm must be one of 0.*, got 1. Use gradient_clipping",
        ),
        (with_optimizer("OneBitAdam", betas=[0.9, 1.0]), "b2 must .*got 1.0"),
        (with_optimizer("ZeroOneAdam", freeze_step=1), "unknown key 'freeze_step'"),
        ({"optimizer": {"type": "OneBitAdam", "params": [1]}}, r"params must be .*, got \[1\]"),
    ],
)
def test_bad_input(config, message):
    with pytest.raises(ValueError, match=message):
        optimizer_from_deepspeed(config)
