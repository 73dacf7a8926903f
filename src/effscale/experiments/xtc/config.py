"""What the experiment ``xtc`` can be told, and its presets."""

import dataclasses
import pathlib

from effscale.experiments.shared.config_parts import ClassifierPart
from effscale.models.validation import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ClassifierPart):
    """What the run does; every field is an option of the command line."""

    corpus: tuple[str, ...] = ("stdlib",)
    """Sources, each of KIND stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field or hf:NAME_OR_FOLDER#field."""
    classes: int = 10
    """Documents of the task, the longest ones: which of them is a passage from?"""
    passage: int = 32
    """Tokens of a passage."""
    train: int = 2000
    """Training passages of all classes together."""
    dev: int = 200
    """Passages by which checkpoints and learning rates are chosen."""
    test: int = 500
    """Passages that are measured on."""
    batch_size: int = 8
    """Passages in a batch."""
    teacher_layers: tuple[int, ...] = (1, 3, 5)
    """Layers of the teacher that the students begin as."""
    teacher_steps: int = 150
    """Steps of the teacher's fine-tuning."""
    budgets: tuple[int, ...] = (25, 75, 225)
    """Steps of the students' trainings, ascending; binary and ternary ones begin as the float one of the longest."""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Peaks of the learning rate, all of which every arm tries at every budget with seed 0; the best is taken for all seeds."""
    evaluations: int = 4
    """Evaluations of a run on the dev passages; the best checkpoint is kept."""
    dropout: bool = False
    """Use the dropouts of the model's config for what is trained."""
    text_model: pathlib.Path | None = None
    """Folder of a BERT to use instead of MiniLM."""
    out: pathlib.Path | None = None
    """Folder of the run; by default runs/xtc/<time>."""

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
    # Wu et al., 2022, and its published scripts: BERT-base (its folder is to be given), 12 layers to 6, batches of 32 rows of 128
    # tokens, an MNLI of 392,702 sentence pairs and 3 classes for 3, 9 and 18 epochs, dropout. The task is passages here, too.
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

FREE = ("seeds", "out", "resume")
