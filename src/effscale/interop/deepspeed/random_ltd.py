"""Random-LTD from DeepSpeed's JSON configuration."""

from collections.abc import Mapping
from typing import Any

from effscale.interop.deepspeed.settings import (
    check_keys,
    part_of_data_efficiency,
    switch,
    whole_number,
    whole_numbers,
)
from effscale.ltd.schedule import RandomLTD, mslg

MODEL = ("model_mask_name", "model_type", "hidden_state_order")
BATCH = ("global_batch_size", "micro_batch_size")
REQUIRED = ("enabled", "random_ltd_layer_id", "random_ltd_schedule")
OPTIONAL = (
    "total_layer_num",
    "random_ltd_layer_num",
    *MODEL,
    *BATCH,
    "layer_token_lr_schedule",
)


def random_ltd_from_deepspeed(config: Mapping[str, Any]) -> RandomLTD | None:
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
    check_keys(config, "the configuration", required=("data_efficiency",), optional=config)
    part = part_of_data_efficiency(config["data_efficiency"], "data_routing", "random_ltd")
    if part is None:
        return None
    block, inner, _ = part
    check_keys(block, inner, required=REQUIRED, optional=OPTIONAL)
    learning_rate = block.get("layer_token_lr_schedule", {"enabled": False})
    if switch(learning_rate, f"{inner}.layer_token_lr_schedule"):
        raise ValueError(
            f"{inner}.layer_token_lr_schedule.enabled must be false, got true. Use a learning rate by tokens, "
            'ScheduleConfig(unit="tokens"), and count tokens with RandomLTD.tokens_per_batch.'
        )
    layers = whole_numbers(block["random_ltd_layer_id"], f"{inner}.random_ltd_layer_id")
    _agree(block, layers, inner)
    return RandomLTD(
        pacing=_pacing(block["random_ltd_schedule"], f"{inner}.random_ltd_schedule"), layers=layers
    )


def _pacing(schedule: Any, where: str) -> Any:
    values = ("min_value", "max_value")
    check_keys(schedule, where, required=(*values, "schedule_type", "schedule_config"))
    if schedule["schedule_type"] != "fixed_linear":
        raise ValueError(
            f"{where}.schedule_type must be 'fixed_linear', the only type, got {schedule['schedule_type']!r}"
        )
    steps, there = schedule["schedule_config"], f"{where}.schedule_config"
    check_keys(steps, there, required=("require_steps", "seq_per_step"))
    return mslg(
        min_value=whole_number(schedule["min_value"], f"{where}.min_value"),
        max_value=whole_number(schedule["max_value"], f"{where}.max_value"),
        require_steps=whole_number(steps["require_steps"], f"{there}.require_steps"),
        seq_per_step=whole_number(steps["seq_per_step"], f"{there}.seq_per_step"),
    )


def _agree(block: Mapping[str, Any], layers: tuple[int, ...], where: str) -> None:
    """Check the redundant layer counts of the configuration."""
    if "random_ltd_layer_num" in block:
        number = whole_number(block["random_ltd_layer_num"], f"{where}.random_ltd_layer_num")
        if number != len(layers):
            raise ValueError(
                f"{where}.random_ltd_layer_num must be {len(layers)}, the number of layers in random_ltd_layer_id, got {number}"
            )
    if "total_layer_num" in block:
        total = whole_number(block["total_layer_num"], f"{where}.total_layer_num")
        if outside := [layer for layer in layers if not 0 <= layer < total]:
            raise ValueError(
                f"{where}.random_ltd_layer_id must be from 0 to {total - 1} with total_layer_num={total}, got {outside}"
            )
