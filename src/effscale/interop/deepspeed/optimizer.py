"""1-bit optimizers from DeepSpeed's JSON configuration."""

from typing import Any, Literal

import optax

from effscale.interop.deepspeed.settings import IGNORED, Block, Key, read
from effscale.optim.onebit_adam import onebit_adam
from effscale.optim.onebit_lamb import onebit_lamb
from effscale.optim.zero_one_adam import zero_one_adam
from effscale.options import checked
from effscale.training.clipping import Clip

# What all have. The ignored ones concern DeepSpeed's communication, or have no effect in DeepSpeed.
_SHARED = {
    "lr": Key(float, 1e-3),
    "betas": Key(tuple[float, float], (0.9, 0.999)),
    "eps": Key(float, 1e-8),
    "weight_decay": Key(float, 0.0),
    "amsgrad": Key(Literal[False, None], None, "1-bit optimizers have no AMSGrad variant"),
    "max_grad_norm": Key(Literal[0, False, None], None, "Use gradient_clipping, next to optimizer"),
    **dict.fromkeys(("cuda_aware", "comm_backend_name", "bias_correction"), IGNORED),
    "eps_inside_sqrt": IGNORED,
}
# What each has beside it; without a value the default is that of the optimizer.
_FREEZE = {"freeze_step": Key(int, None)}
_LAMB = ("max_coeff", "min_coeff", "coeff_beta", "factor_max", "factor_min", "factor_threshold")
_ZERO_ONE = ("var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper")
_KINDS = {
    "OneBitAdam": (onebit_adam, _FREEZE),
    "ZeroOneAdam": (zero_one_adam, dict.fromkeys(_ZERO_ONE, Key(int, None))),
    "OneBitLamb": (onebit_lamb, _FREEZE | dict.fromkeys(_LAMB, Key(float, None))),
}
_NAMES = Literal["OneBitAdam", "ZeroOneAdam", "OneBitLamb"]
_OPTIMIZER = {
    "type": Key(str),
    "params": Key(Any, None),
    "legacy_fusion": IGNORED,
}
_CONFIG = {"optimizer": Key(_OPTIMIZER), "gradient_clipping": Key(float | None, None)}


def optimizer_from_deepspeed(
    config: Block, learning_rate: Any = None, **options: Any
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
    values = read(config, "", _CONFIG, others=True)
    block = values["optimizer"]
    names = {name.lower(): name for name in _KINDS}
    kind = checked("optimizer.type", names.get(block["type"].lower(), block["type"]), _NAMES)
    maker, own = _KINDS[kind]
    params = read(block["params"] or {}, "optimizer.params", _SHARED | own)
    b1, b2 = params["betas"]
    taken = {name: params[name] for name in ("eps", "weight_decay")}
    taken |= {name: params[name] for name in own if params[name] is not None}
    if values["gradient_clipping"]:
        taken["clip"] = Clip(values["gradient_clipping"], by="local")
    rate = params["lr"] if learning_rate is None else learning_rate
    return maker(rate, b1, b2, **(taken | options))
