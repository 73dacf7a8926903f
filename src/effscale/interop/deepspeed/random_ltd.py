"""Random-LTD from DeepSpeed's JSON configuration."""

from typing import Any, Literal

from effscale.interop.deepspeed.settings import (
    IGNORED,
    SWITCH,
    Block,
    Key,
    part_of_data_efficiency,
    read,
)
from effscale.ltd.schedule import RandomLTD, mslg

SCHEDULE = {
    "min_value": Key(int),
    "max_value": Key(int),
    "schedule_type": Key(Literal["fixed_linear"]),
    "schedule_config": Key({"require_steps": Key(int), "seq_per_step": Key(int)}),
}
BY_TOKENS = Key(
    Literal[False],
    advice='Use a learning rate by tokens, ScheduleConfig(unit="tokens"), and count tokens with RandomLTD.tokens_per_batch',
)
RANDOM_LTD = {
    "enabled": SWITCH,
    "random_ltd_layer_id": Key(tuple[int, ...]),
    "random_ltd_schedule": Key(SCHEDULE),
    "total_layer_num": Key(int, None),
    "random_ltd_layer_num": Key(int, None),
    "layer_token_lr_schedule": Key({"enabled": BY_TOKENS}, {"enabled": False}),
    **dict.fromkeys(("model_mask_name", "model_type", "hidden_state_order"), IGNORED),
    **dict.fromkeys(("global_batch_size", "micro_batch_size"), IGNORED),
}


def random_ltd_from_deepspeed(config: Block) -> RandomLTD | None:
    """Read random-LTD from a DeepSpeed configuration.

    As in DeepSpeed, it is active if its own ``enabled`` is true. The settings about the layout of the model (``model_mask_name``,
    ``model_type``, ``hidden_state_order``) and about the batch are ignored, as effscale takes them from the model and the batch.
    ``layer_token_lr_schedule``, which DeepSpeed does not implement, must be off. Instead, count with
    ``RandomLTD.tokens_per_batch`` and use ``ScheduleConfig(unit="tokens")``.

    Args:
        config: The whole configuration, from ``json.load``.

    Returns:
        The ``RandomLTD``, or None if it is off.

    Raises:
        ValueError: A key is unknown or missing, a value is out of range, or values contradict each other.

    Example:
        >>> ltd = random_ltd_from_deepspeed({"data_efficiency": {"data_routing": {"random_ltd": {
        ...     "enabled": True, "random_ltd_layer_id": [1, 2, 3],
        ...     "random_ltd_schedule": {"min_value": 128, "max_value": 2048, "schedule_type": "fixed_linear",
        ...         "schedule_config": {"require_steps": 200_000, "seq_per_step": 16}}}}}})
        >>> ltd.layers, ltd.pacing(1_667)
        ((1, 2, 3), 144)
    """
    block = read(config, "", {"data_efficiency": Key(Any)}, others=True)["data_efficiency"]
    part = part_of_data_efficiency(block, "data_routing", "random_ltd")
    if part is None:
        return None
    values, where = read(part[0], part[1], RANDOM_LTD), part[1]
    layers, schedule = values["random_ltd_layer_id"], values["random_ltd_schedule"]
    number, total = values["random_ltd_layer_num"], values["total_layer_num"]
    if number not in (None, len(layers)):
        raise ValueError(
            f"{where}.random_ltd_layer_num must be {len(layers)}, the number of layers in random_ltd_layer_id, got {number}"
        )
    if total is not None and (outside := [i for i in layers if not 0 <= i < total]):
        raise ValueError(
            f"{where}.random_ltd_layer_id must be from 0 to {total - 1} with total_layer_num={total}, got {outside}"
        )
    pacing = mslg(
        min_value=schedule["min_value"],
        max_value=schedule["max_value"],
        **schedule["schedule_config"],
    )
    return RandomLTD(pacing=pacing, layers=layers)
