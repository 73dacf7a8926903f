"""The layers that drop tokens."""

from effscale.models import TransformerConfig


def dropping_layers(
    config: TransformerConfig, layers: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Return the numbers of the layers that drop tokens, in order; layers are counted from 0 through the whole model.

    Args:
        config: The config of the model.
        layers: The numbers; None means all except the first and the last, as in the paper.

    Raises:
        ValueError: ``layers`` is empty, contains a duplicate or a number that is not a layer; or it is None and the model has no
            layers between the first and the last.

    Example:
        >>> from effscale.models import preset
        >>> dropping_layers(preset("gpt2"))
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    """
    if layers is None:
        if config.num_layers < 3:
            raise ValueError(
                f"layers=None drops tokens in all layers except the first and the last, which leaves none of "
                f"{config.num_layers}. Use a model with at least 3 layers, or name the layers."
            )
        return tuple(range(1, config.num_layers - 1))
    if not layers:
        raise ValueError(
            "layers must have at least one layer, got (). Use None for all layers except the first and the last."
        )
    if outside := [layer for layer in layers if not 0 <= layer < config.num_layers]:
        raise ValueError(
            f"layers must be from 0 to {config.num_layers - 1}, got {layers}, of which {outside} are not in the model"
        )
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers must not have duplicates, got {layers}")
    return tuple(sorted(layers))
