"""Random-LTD for training runs: a schedule of kept tokens around any loss."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from effscale.ltd.accounting import layer_token_average
from effscale.ltd.layers import dropping_layers
from effscale.ltd.runner import token_dropping
from effscale.models import PatchInputs, TransformerConfig
from effscale.options import Options, check
from effscale.training import LinearPacing, Loss, Stages, stages
from effscale.training.pacing import Clock, Pacing
from effscale.training.staged import token_shape
from effscale.training.step import count_tokens

KEPT = "kept_tokens"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX also creates it from placeholders
class KeptTokens:
    """The number of tokens that dropping layers keep, as a part of a batch.

    It has no arrays: the number is static, so that each number is a separate program.
    """

    kept: int = dataclasses.field(metadata={"static": True})


def mslg(
    *,
    min_value: int,
    max_value: int,
    require_steps: int,
    seq_per_step: int | None = None,
    clock: Clock = "steps",
) -> LinearPacing:
    r"""Return the pacing of Monotonic Sequence Length Growth: linear growth of the number of kept tokens.

    $$r_t = \min(\lfloor t/R \, (r_{max} - r_{min}) + r_{min} \rfloor_g, r_{max})$$

    rounded down to a multiple of $g$, but never below $r_{min}$, and exactly $r_{max}$ from $t = R$ on.
    Step ``b`` (from 0) takes $r_b$. The names are DeepSpeed's.

    Args:
        min_value: The number of tokens kept at first.
        max_value: The number of tokens kept at the end: the whole row.
        require_steps: $R$, the count at which all are kept.
        seq_per_step: $g$. Each value is a program to compile; None makes about a dozen.
        clock: What to count.

    References:
        Yao et al., "Random-LTD" (2022), section 3.2. https://arxiv.org/abs/2211.11586

    Example:
        >>> growth = mslg(min_value=128, max_value=2048, require_steps=200_000, seq_per_step=16)
        >>> [growth(t) for t in (0, 1_666, 1_667, 100_000, 199_999, 200_000)]
        [128, 128, 144, 1088, 2032, 2048]
    """
    return LinearPacing(
        min_difficulty=min_value,
        max_difficulty=max_value,
        total=require_steps,
        difficulty_step=seq_per_step,
        clock=clock,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomLTD(Options):
    """Random layerwise token dropping during training.

    References:
        Yao et al., "Random-LTD" (2022). https://arxiv.org/abs/2211.11586
        Li et al., "DeepSpeed Data Efficiency" (2022), section 3.2. https://arxiv.org/abs/2212.03597

    Example:
        Train a model with it; ``fit(step_fn=step, before_step=step.before_step)`` does the rest.

        >>> from effscale.models import gpt2
        >>> from effscale.training import AdamWConfig, StagedStep, make_train_step, next_token_loss
        >>> config = gpt2(num_layers=4, d_model=16, num_heads=2, vocab_size=50, max_length=64)
        >>> ltd = RandomLTD(pacing=mslg(min_value=16, max_value=64, require_steps=700, seq_per_step=16))
        >>> ltd.check(config)
        >>> train_step = make_train_step(
        ...     ltd.loss(next_token_loss), AdamWConfig().build(1e-3), tokens_per_batch=ltd.tokens_per_batch(config))
        >>> step = StagedStep(train_step, ltd.stages(), ltd.shape_batch)
        >>> step.stages
        Stages(starts=(0, 234, 467, 700), values=(16, 32, 48, 64))
    """

    pacing: Pacing
    """The pacing of the number of kept tokens, such as ``mslg``."""
    layers: tuple[int, ...] | None = None
    """The numbers of the layers that drop tokens, counted from 0; None means all except the first and the last."""
    field: str | None = "input_ids"
    """The name of the tokens in a batch, whose length is checked. None if batches have no tokens, such as images.
    (Batches with ``images`` for effscale's image models do not need None.)"""

    def __post_init__(self):
        super().__post_init__()
        check(self, self.pacing(0) >= 1, "pacing", "of at least 1 token")

    def check(self, config: TransformerConfig, length: int | None = None) -> None:
        """Raise an error if the schedule does not fit a model.

        Args:
            config: The config of the model.
            length: The number of tokens in a whole row; None uses the number of positions of the model.

        Raises:
            ValueError: The layers are not in the model; or the schedule ends below the whole row, so that no step
                trains on it, or above, so that it drops nothing during a part of its steps.
        """
        dropping_layers(config, self.layers)
        if length is None:
            inputs = config.inputs
            length = inputs.num_tokens if isinstance(inputs, PatchInputs) else config.max_length
        last = self.pacing(self.pacing.end)
        if length is not None and last != length:
            what = "so it never reaches the whole row" if last < length else "more than the row has"
            raise ValueError(
                f"pacing must end at the row length {length}, got {last} kept tokens, {what}"
            )

    def loss(self, loss_fn: Callable[..., Loss]) -> Callable[..., Loss]:
        """Wrap the loss of an effscale model so that it drops tokens where a batch requires it.

        The layers of other models can drop tokens with ``effscale.ltd.sample_kept``, ``effscale.ltd.take_tokens`` and
        ``effscale.ltd.put_tokens``; docs/random_ltd.md has an example.

        Args:
            loss_fn: ``loss_fn(model, batch, key, *, run_group) -> Loss``, such as
                ``effscale.training.next_token_loss``.

        Returns:
            ``loss_fn(model, batch, key) -> Loss``; a fourth argument (``frozen``) is passed on. Tokens are dropped if there
            is a key, as with dropout, and the batch comes from ``shape_batch``; so evaluation sees all tokens. The function
            raises a TypeError for models other than effscale's.
        """

        @functools.wraps(loss_fn)
        def with_dropping(
            model: Any,
            batch: Mapping[str, Any],
            key: PRNGKeyArray | None = None,
            *frozen: Any,
            **options: Any,
        ) -> Loss:
            plain = {name: value for name, value in batch.items() if name != KEPT}
            if key is not None and KEPT in batch:
                config = getattr(model, "config", None)
                if not isinstance(config, TransformerConfig):
                    raise TypeError(
                        f"RandomLTD.loss needs an effscale model, got a {type(model).__name__}. "
                        f"Use a custom loss instead: read batch[{KEPT!r}].kept, and let its layers drop tokens with "
                        "sample_kept, take_tokens and put_tokens (docs/random_ltd.md, Your own model)."
                    )
                options["run_group"] = token_dropping(
                    config, kept=batch[KEPT].kept, key=key, layers=self.layers
                )
            return loss_fn(model, plain, key, *frozen, **options)

        return with_dropping

    def stages(self, batch_size: int | None = None, length: int | None = None) -> Stages[int]:
        """Return the number of kept tokens at each training step.

        Args:
            batch_size: The number of rows in a batch; the clocks ``samples`` and ``tokens`` need it.
            length: The number of tokens in a row; the clock ``tokens`` needs it. All tokens of a row count, dropped or not.

        Raises:
            ValueError: An argument that the clock needs is missing.
        """
        if self.pacing.clock == "steps":
            return stages(self.pacing, offset=0)
        by_tokens = self.pacing.clock == "tokens"
        if batch_size is None or (by_tokens and length is None):
            raise ValueError(
                f"clock={self.pacing.clock!r} needs batch_size, and also length for tokens, "
                f"got batch_size={batch_size} and length={length}"
            )
        each = batch_size * (length or 1) if by_tokens else batch_size
        return stages(self.pacing, cost=lambda kept: each)

    def shape_batch(self, batch: Mapping[str, Any], kept: int) -> dict[str, Any]:
        """Return the batch with the number of tokens that dropping layers keep, at most the length of its rows.

        Raises:
            ValueError: Rows are longer than the final number of kept tokens, so that no step would see whole rows; or
                the batch has no tokens named ``field``.
        """
        if self.field is not None and "images" not in batch:
            length, last = token_shape(batch, self.field)[1], self.pacing(self.pacing.end)
            if length > last:
                raise ValueError(
                    f"RandomLTD.pacing must end at the row length {length}, got {last} kept tokens"
                )
            kept = min(kept, length)  # one program instead of one for each greater number
        return {**batch, KEPT: KeptTokens(kept)}

    def tokens_per_batch(self, config: TransformerConfig) -> Callable[[Any], int]:
        """Return the function that counts a batch's tokens, averaged over layers; for ``make_train_step(tokens_per_batch=...)``.

        A learning rate by tokens (``ScheduleConfig(unit="tokens")``) is then a LayerToken learning rate, and a run that
        stops by tokens consumed counts the tokens that layers have processed. Rows that a curriculum has shortened
        count with their shortened length.

        Args:
            config: The config of the model.

        Returns:
            A function of a batch.
        """
        dropping = len(dropping_layers(config, self.layers))

        def tokens(batch: Mapping[str, Any]) -> int:
            if isinstance(config.inputs, PatchInputs):
                rows, length = count_tokens(batch), config.inputs.num_tokens  # counts examples
            else:
                rows, length = token_shape(batch, self.field or "input_ids")
            kept = batch[KEPT].kept if KEPT in batch else length
            return rows * layer_token_average(length, kept, config.num_layers, dropping)

        return tokens
