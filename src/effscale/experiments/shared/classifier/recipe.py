"""Fine-tuning recipes of classifiers."""

import dataclasses

from effscale.options import Options, PositiveFloat, PositiveInt, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Options):
    """Fine-tuning options of a task."""

    epochs: PositiveInt = 3
    """Number of passes over the training examples."""
    batch_size: PositiveInt = 16
    """Examples per batch."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate: a linear warmup, then a linear decay to 0."""
    train: PositiveInt | None = None
    """Number of training examples; None uses all."""
    test: PositiveInt | None = None
    """Number of test examples; None uses all."""

    def __post_init__(self):
        super().__post_init__()
        enough = self.train is None or self.train >= self.batch_size
        check(self, enough, "train", f"a batch of {self.batch_size} or more")
