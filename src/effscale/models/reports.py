"""Layer reports: the auxiliary loss that layers add to the objective, and quantities to monitor.

A feed-forward returns its output and a dict of arrays. The model stacks each entry over the layers of a group, so
``Encoded.reports[group][block][name]`` has a leading layer dimension. The entry ``aux_loss`` is a loss; scalars and
vectors with any other name are metrics.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

AUX_LOSS = "aux_loss"


def by_layer(reports: Any, name: str) -> Shaped[Array, "layers *entry"]:
    """Stack an entry of ``Encoded.reports`` or ``Encoded.captured`` over the layers that have it, in running order.

    Args:
        reports: For each block of each group, a dict of arrays with a leading layer dimension.
        name: The entry; it must have the same shape in all layers.

    Raises:
        ValueError: No layer has the entry.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2
        >>> config = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> model = Transformer(config, rngs=nnx.Rngs(0))
        >>> encoded = model.encode(jnp.zeros((1, 8), jnp.int32), capture="layer_in")
        >>> by_layer(encoded.captured, "layer_in").shape
        (2, 1, 8, 16)
    """
    stretches = []
    for blocks in reports:
        # The blocks of a group alternate, so the layer number varies fastest over the blocks.
        if found := [block[name] for block in blocks or () if name in block]:
            stretches.append(jnp.stack(found, 1).reshape(-1, *found[0].shape[1:]))
    if not stretches:
        names = sorted({entry for _, _, entry, _ in _entries(reports)})
        raise ValueError(
            f"no layer reports {name!r}. Reported entries: {', '.join(names) or 'none'}"
        )
    return jnp.concatenate(stretches)


def aux_loss(reports: Any) -> Float[Array, ""] | None:
    """Return the sum of ``aux_loss`` over all layers in float32, or None if no layer reports it.

    Raises:
        ValueError: An entry with another name ends in ``loss``: it would be monitored but never minimized.
    """
    losses = []
    for _, _, name, value in _entries(reports):
        if name == AUX_LOSS:
            losses.append(value.astype(jnp.float32).sum())
        elif name.endswith("loss"):
            raise ValueError(
                f"a feed-forward reports {name!r}, but only {AUX_LOSS!r} is added to the loss. Add it to that entry, "
                "multiplied by its coefficient. To monitor it only, choose a name that does not end in 'loss'"
            )
    return sum(losses[1:], losses[0]) if losses else None


def report_means(reports: Any) -> dict[str, Float[Array, "*entry"]]:
    """Return the mean over layers of each reported scalar and vector except ``aux_loss``, in float32.

    An entry whose length differs between layers (loads of 32 and of 64 experts) is averaged per block instead, as
    ``load/0.0`` for block 0 of group 0. Entries with more dimensions are left out.
    """
    found: dict[str, dict[str, Array]] = {}
    for group, block, name, value in _entries(reports):
        if name != AUX_LOSS and value.ndim <= 2:
            found.setdefault(name, {})[f"{name}/{group}.{block}"] = value.astype(jnp.float32)
    means = {}
    for name, apart in found.items():
        if len({value.shape[1:] for value in apart.values()}) == 1:
            apart = {name: jnp.concatenate(list(apart.values()))}
        means |= {key: value.mean(0) for key, value in apart.items()}
    return means


def _entries(reports: Any) -> Iterator[tuple[int, int, str, Array]]:
    """Yield the group, block, name and value of each entry."""
    for group, blocks in enumerate(reports):
        for block, report in enumerate(blocks or ()):
            for name, value in report.items():
                yield group, block, name, value
