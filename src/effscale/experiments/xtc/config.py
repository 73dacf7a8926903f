"""Config and presets of the experiment ``xtc``."""

import dataclasses
import pathlib

from effscale.command.folder import OUTPUT
from effscale.experiments.shared.config_parts import ClassifierPart
from effscale.options import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ClassifierPart):
    """Options of a run; every field is a command-line option."""

    corpus: tuple[str, ...] = ("stdlib",)
    """Sources of the corpus, each stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field or hf:NAME_OR_FOLDER#field."""
    classes: int = 10
    """Number of documents (the longest ones) in the task, which is to classify the document a passage comes from."""
    passage: int = 32
    """Tokens per passage."""
    train: int = 2000
    """Number of training passages over all classes."""
    dev: int = 200
    """Number of passages for choosing checkpoints and learning rates."""
    test: int = 500
    """Number of test passages."""
    batch_size: int = 8
    """Passages per batch."""
    teacher_layers: tuple[int, ...] = (1, 3, 5)
    """Layers of the teacher that the students are initialized from."""
    teacher_steps: int = 150
    """Optimizer steps of fine-tuning the teacher."""
    budgets: tuple[int, ...] = (25, 75, 225)
    """Optimizer steps of the students, in ascending order; binary and ternary students are initialized from the float student with the most steps."""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Peak learning rates. Every arm tries all of them at every budget with seed 0, and the best one is used for all seeds."""
    evaluations: int = 4
    """Number of evaluations per run on the dev passages; the best checkpoint is kept."""
    dropout: bool = False
    """Use the dropout rates of the model's config in training."""
    text_model: pathlib.Path | None = None
    """Folder of a BERT to use instead of MiniLM."""
    out: pathlib.Path | None = None
    """Run folder; the default is runs/xtc/<time>."""

    def __post_init__(self):
        super().__post_init__()
        check(self, len(self.corpus) >= 1, "corpus", "at least one source")
        check(self, self.classes >= 2, "classes", "at least 2")
        for name in ("passage", "batch_size", "teacher_steps", "evaluations"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        for name in ("train", "dev", "test"):
            each = f"a number of passages, at least classes={self.classes}"
            check(self, getattr(self, name) >= self.classes, name, each)
        fits = self.train // self.classes * self.classes >= self.batch_size
        check(self, fits, "batch_size", f"at most train={self.train}, equally many of each class")
        known = len(self.teacher_layers) >= 1 and min(self.teacher_layers) >= 0
        check(self, known, "teacher_layers", "at least one layer, counted from 0")
        ascending = tuple(sorted(set(self.budgets)))
        check(
            self,
            bool(ascending) and ascending[0] >= 1,
            "budgets",
            "at least one number of steps above 0",
        )
        check(self, self.budgets == ascending, "budgets", "ascending")
        rates = self.rates
        check(self, bool(rates) and min(rates) > 0, "rates", "at least one number above 0")
        check(self, len(set(rates)) == len(rates), "rates", "different rates")


PRESETS = {
    "smoke": Config(
        seeds=1,
        classes=4,
        passage=16,
        train=64,
        dev=32,
        test=32,
        teacher_steps=4,
        budgets=(4,),
        rates=(3e-4,),
        evaluations=1,
    ),
    "default": Config(),
    # Wu et al., 2022, and its published scripts: BERT-base (set its folder), 12 layers to 6, batches of 32 rows of
    # 128 tokens, MNLI with 392,702 sentence pairs and 3 classes for 3, 9 and 18 epochs, dropout. The task here is
    # passages too.
    "paper": Config(
        classes=3,
        passage=128,
        train=3000,
        dev=1000,
        test=1000,
        batch_size=32,
        teacher_layers=(1, 3, 5, 7, 9, 11),
        teacher_steps=36_815,
        budgets=(36_815, 110_447, 220_894),
        rates=(2e-5, 1e-4, 5e-4),
        evaluations=220,
        warmup=1 / 18,
        dropout=True,
    ),
}

FREE = ("seeds", *OUTPUT)
