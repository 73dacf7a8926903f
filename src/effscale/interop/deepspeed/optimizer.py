"""1-bit optimizers from DeepSpeed's JSON configuration."""

from collections.abc import Mapping
from typing import Any

import optax

from effscale.interop.deepspeed.settings import check_keys, number, whole_number
from effscale.optim.onebit_adam import onebit_adam
from effscale.optim.onebit_lamb import onebit_lamb
from effscale.optim.zero_one.adam import zero_one_adam
from effscale.options import did_you_mean
from effscale.training.clipping import Clip

_SHARED = {"eps": 1e-8, "weight_decay": 0.0}
_LAMB = ("max_coeff", "min_coeff", "coeff_beta", "factor_max", "factor_min", "factor_threshold")
_ZERO_ONE = ("var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper")
_COUNTS = ("freeze_step", *_ZERO_ONE)
_KINDS = {
    "onebitadam": (onebit_adam, ("freeze_step",)),
    "zerooneadam": (zero_one_adam, _ZERO_ONE),
    "onebitlamb": (onebit_lamb, ("freeze_step", *_LAMB)),
}
# Options of DeepSpeed's communication, and options that have no effect in DeepSpeed.
_PASSED_OVER = (
    "cuda_aware",
    "comm_backend_name",
    "bias_correction",
    "eps_inside_sqrt",
    "amsgrad",
    "max_grad_norm",
)


def optimizer_from_deepspeed(
    config: Mapping[str, Any], learning_rate: Any = None, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Read a 1-bit optimizer from a DeepSpeed configuration.

    ``optimizer.type`` is OneBitAdam, ZeroOneAdam or OneBitLamb. ``gradient_clipping`` becomes
    ``Clip(norm, by="local")``, the meaning it has in DeepSpeed. Options that have no effect in DeepSpeed
    (``bias_correction``, ``eps_inside_sqrt``) and those of its communication backends are ignored; for bias correction pass
    ``bias_correction=True`` as an option. The rest of the configuration is not read.

    Args:
        config: The whole configuration, from ``json.load``.
        learning_rate: A schedule to use instead of the ``lr`` of the configuration.
        **options: Options that DeepSpeed does not have: ``workers``, ``mask``, ``exp_avg_mask``, ...

    Returns:
        The optimizer.

    Raises:
        ValueError: A key is unknown or missing, a value is out of range, or an option is set that DeepSpeed's
            1-bit optimizers do not support either.

    Example:
        >>> optimizer = optimizer_from_deepspeed({"gradient_clipping": 1.0, "optimizer": {
        ...     "type": "OneBitAdam", "params": {"lr": 4e-4, "freeze_step": 23000, "weight_decay": 0.01}}})

    References:
        DeepSpeed, "1-bit Adam" (tutorial). https://www.deepspeed.ai/tutorials/onebit-adam/
    """
    check_keys(config, "the configuration", required=("optimizer",), optional=config)
    block = config["optimizer"]
    check_keys(block, "optimizer", required=("type",), optional=("params", "legacy_fusion"))
    kind = str(block["type"]).lower()
    if kind not in _KINDS:
        names = ("OneBitAdam", "ZeroOneAdam", "OneBitLamb")
        raise ValueError(
            f"optimizer.type must be one of {', '.join(names)}, got {block['type']!r}: {did_you_mean(block['type'], names)}"
        )
    maker, own = _KINDS[kind]
    given = block.get("params") or {}
    check_keys(given, "optimizer.params", optional=("lr", "betas", *_SHARED, *own, *_PASSED_OVER))
    if given.get("amsgrad"):
        raise ValueError(
            "optimizer.params.amsgrad must be false, got True, as 1-bit optimizers have no AMSGrad variant"
        )
    if given.get("max_grad_norm"):
        raise ValueError(
            f"optimizer.params.max_grad_norm must be 0, got {given['max_grad_norm']!r}. Use gradient_clipping, next to optimizer."
        )
    b1, b2 = _betas(given.get("betas", (0.9, 0.999)))
    chosen = {key: given[key] for key in own if key in given}
    chosen |= {key: given.get(key, default) for key, default in _SHARED.items()}
    where = "optimizer.params"
    taken: dict[str, Any] = {
        key: whole_number(value, f"{where}.{key}")
        if key in _COUNTS
        else number(chosen, key, None, where)
        for key, value in chosen.items()
    }
    if config.get("gradient_clipping"):
        taken["clip"] = Clip(number(config, "gradient_clipping", None, ""), by="local")
    if learning_rate is None:
        learning_rate = number(given, "lr", 1e-3, where)
    return maker(learning_rate, b1, b2, **(taken | options))


def _betas(value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"optimizer.params.betas must be two numbers, got {value!r}")
    b1, b2 = (number({"betas": one}, "betas", None, "optimizer.params") for one in value)
    return float(b1), float(b2)
