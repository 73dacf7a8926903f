"""Which layers drop tokens."""

from effscale.models import TransformerConfig


def dropping_layers(
    config: TransformerConfig, layers: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Return the numbers of the layers that drop tokens, in order; layers count from 0 through the whole model.

    Args:
        config: The model's.
        layers: The numbers; None: all but the first and the last, as in the paper.

    Raises:
        ValueError: None is given and there is no layer between the first and the last; or a number is no layer's, or
            is given twice; or there is none.

    Example:
        >>> from effscale.models import preset
        >>> dropping_layers(preset("gpt2"))
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    """
    if layers is None:
        if config.num_layers < 3:
            raise ValueError(
                f"layers=None drops tokens in all layers but the first and the last, and of "
                f"{config.num_layers} none is left; use a model of 3 layers or more, or name the layers"
            )
        return tuple(range(1, config.num_layers - 1))
    if not layers:
        raise ValueError("layers=(): name at least one layer, or None for all but first and last")
    if outside := [layer for layer in layers if not 0 <= layer < config.num_layers]:
        raise ValueError(
            f"layers={layers} names {outside}; the model has layers 0 to {config.num_layers - 1}"
        )
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers={layers} names a layer twice")
    return tuple(sorted(layers))
