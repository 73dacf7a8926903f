"""Fine-tuning recipes of classifiers."""

import dataclasses

from effscale.models.validation import check, check_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Fine-tuning options of a task."""

    epochs: int = 3
    """Number of passes over the training examples."""
    batch_size: int = 16
    """Examples per batch."""
    learning_rate: float = 1e-4
    """Peak learning rate: a linear warmup, then a linear decay to 0."""
    train: int | None = None
    """Number of training examples; None uses all."""
    test: int | None = None
    """Number of test examples; None uses all."""

    def __post_init__(self):
        check_finite(self)
        check(self, self.epochs >= 1, "epochs", "at least 1")
        check(self, self.batch_size >= 1, "batch_size", "at least 1")
        check(self, self.learning_rate > 0, "learning_rate", "above 0")
        least = self.batch_size
        check(
            self, self.train is None or self.train >= least, "train", f"a batch of {least} or more"
        )
        check(self, self.test is None or self.test >= 1, "test", "at least 1")
