"""A small BERT learns to tell hidden tokens of real text, with and without random-LTD, in equally many steps; then both learn a task.

All of its layers but the first and the last see a quarter of a row's tokens at first, and nearly all of them at the end: all would
be kept after the last step. Both arms get the same rows with the same tokens hidden. What a dropping layer keeps is drawn without regard to what is hidden, as in the
paper; a hidden token that it does not keep passes it by. Then each model, and one that was not pretrained, learns which document
a passage comes from. What is asked: is the model as good, and what is saved?

Both arms get the same care: the learning rate warms up by steps, and a search by the same rule, with a seed that is not
compared, finds each arm's peak and warmup. Finally both arms make the first steps of a run at a high learning rate, over more
seeds, to see whether one is more stable than the other.

    python -m effscale.experiments.random_ltd_bert
    python -m effscale.experiments.random_ltd_bert --corpus 'text:books/*.txt' --classes 6 --steps 2000
    python -m effscale.experiments.random_ltd_bert --out runs/mine --resume

The default corpus is the Python standard library of the running interpreter, so nothing is downloaded. Each pretrained model is
a Hugging Face folder, ``seed-<n>/<arm>/model`` in the run folder.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal

import numpy as np

from effscale.experiments.cli import messages, parse
from effscale.experiments.finetune import Recipe
from effscale.experiments.host import keep_freed_memory
from effscale.experiments.prepared import (
    check_folder,
    corpus_digests,
    prepared_corpora,
    resumable,
)
from effscale.experiments.random_ltd import ARMS, Dropping, LearningRate, check_shared
from effscale.experiments.results import Result, finish
from effscale.experiments.search import Found, Point, Search
from effscale.models import LMHead, NormConfig, TransformerConfig, bert
from effscale.models.config import Remat
from effscale.models.validation import check
from effscale.training import AdamWConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A BERT of any size; its vocabulary is the tokenizer's and the mask token."""

    num_layers: int = 6
    """Layers; random-LTD needs 3."""
    d_model: int = 128
    """Width of the residual stream."""
    num_heads: int = 4
    """Attention heads."""
    dropout: float = 0.0
    """Dropout of embeddings, attention and residuals."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products."""
    remat: Remat = "none"
    """What the backward pass computes again: none, dots (all but matrix products), full."""

    def build(self, vocab_size: int, length: int) -> TransformerConfig:
        """The transformer's config, with a head for hidden tokens."""
        head = LMHead(name="mlm", bias=True, transform="gelu", norm=NormConfig(epsilon=1e-12))
        config = bert(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads,
            vocab_size=vocab_size,
            max_length=length,
            dropout=self.dropout,
            pooler=False,
            heads=(head,),
        )
        return dataclasses.replace(config, dtype=self.dtype, remat=self.remat)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Early:
    """The first steps of runs at a high learning rate, by both arms."""

    seeds: int = 8
    """Runs of each arm, of seeds 0, 1, ...; 0 makes none."""
    steps: int = 200
    """Steps of each; the schedule is that of a whole run, cut off here."""
    learning_rate: float = 3e-3
    """Peak of the schedule."""

    def __post_init__(self):
        check(self, self.seeds >= 0, "seeds", "at least 0")
        check(self, self.steps >= 1, "steps", "at least 1")
        finite = 0 < self.learning_rate < float("inf")
        check(self, finite, "learning_rate", "above 0, and finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the run does; every field is an option of the command line."""

    corpus: tuple[str, ...] = ("stdlib",)
    """Sources, each [WEIGHT*]KIND: stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field, hf:NAME_OR_FOLDER#field."""
    seeds: int = 3
    """Runs of each arm; seeds 0, 1, ... decide initial weights, the order of rows, the tokens hidden and those kept."""
    vocab_size: int = 512
    """Size of the byte-level BPE that is trained on the corpus; the mask token comes on top."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out."""
    length: int = 128
    """Tokens in a row, and positions of the model."""
    batch_size: int = 16
    """Rows in a batch."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into, to save memory."""
    steps: int = 600
    """Batches to pretrain on."""
    hidden: float = 0.15
    """Share of the tokens to be told: 80 percent of them masked, 10 percent replaced, 10 percent left."""
    model: ModelConfig = ModelConfig()
    """The model."""
    ltd: Dropping = Dropping(min_value=32, seq_per_step=16, share=1.0)
    """Random-LTD's schedule; with a share of 1 no step keeps all tokens."""
    learning_rate: float = 1e-3
    """Peak of the schedule, where the search starts: a linear warmup by steps, then linearly by layer tokens to a tenth."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises, where the search starts; fine-tuning takes it as it is."""
    search: Search = Search(learning_rate_factor=2.0, points=10)
    """How each arm's learning rate and warmup are searched for."""
    early: Early = Early()
    """The first steps at a high learning rate."""
    optimizer: AdamWConfig = AdamWConfig(b2=0.98, weight_decay=0.01)
    """AdamW."""
    clip_norm: float = 1.0
    """Greatest norm of the gradient."""
    eval_every: int = 100
    """Steps between evaluations on a part of the held-out text, and between checkpoints; at the end all is taken, too."""
    eval_batches: int = 20
    """Batches in that part."""
    classes: int = 20
    """Documents of the task, the largest ones: which of them is a passage from?"""
    passage: int = 32
    """Tokens of a passage."""
    finetune: Recipe = Recipe(epochs=4, batch_size=32, learning_rate=5e-4, train=1000, test=1000)
    """How the task is learned; ``train`` and ``test`` passages of all classes together."""
    out: pathlib.Path | None = None
    """Folder of the run; by default runs/random_ltd_bert/<time>."""
    resume: bool = False
    """Go on with the run in --out: finished runs are kept, the last one goes on from its checkpoint."""
    cache: pathlib.Path | None = None
    """Where prepared corpora are kept; by default the user's cache folder."""

    def __post_init__(self):
        check_shared(self)
        check(self, 0 < self.validation_fraction < 1, "validation_fraction", "between 0 and 1")
        check(self, len(self.corpus) >= 1, "corpus", "at least one source")
        for name in ("length", "batch_size", "accumulate", "steps", "passage"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        divisor = f"a divisor of batch_size={self.batch_size}"
        check(self, self.batch_size % self.accumulate == 0, "accumulate", divisor)
        check(self, 0 < self.hidden < 1, "hidden", "between 0 and 1")
        finite = 0 < self.learning_rate < float("inf")
        check(self, finite, "learning_rate", "above 0, and finite")
        compared = f"at least seeds={self.seeds}, so that no compared run has it"
        check(self.search, self.search.seed >= self.seeds, "seed", compared)
        within = self.early.seeds == 0 or self.early.steps <= self.steps
        check(self.early, within, "steps", f"at most the steps={self.steps} of a whole run")
        check(self, self.classes >= 2, "classes", "at least 2")
        row = f"at most the {self.length} tokens of a row"
        check(self, self.passage <= self.length, "passage", row)
        for name in ("train", "test"):
            count = getattr(self.finetune, name)
            each = f"a number of passages, at least classes={self.classes}"
            check(self.finetune, count is not None and count >= self.classes, name, each)
        # An impossible model or schedule is refused here.
        model = self.model.build(self.vocab_size, self.length)
        self.ltd.build(self.length, self.steps).check(model)

    @property
    def start(self) -> Point:
        """Where the search begins."""
        return Point(self.learning_rate, round(self.warmup * self.steps))

    @staticmethod
    def rate(point: Point) -> LearningRate:
        """The learning rate with a peak and a warmup."""
        return LearningRate(
            peak=point.learning_rate, warmup=point.warmup, final=point.learning_rate / 10
        )


PRESETS = {
    "smoke": Config(
        seeds=1,
        vocab_size=512,
        length=64,
        batch_size=8,
        steps=16,
        model=ModelConfig(num_layers=3, d_model=32, num_heads=2),
        ltd=Dropping(min_value=16, seq_per_step=16, share=1.0),
        search=Search(learning_rate_factor=2.0, points=2),
        early=Early(seeds=2, steps=8),
        eval_every=8,
        eval_batches=2,
        classes=4,
        finetune=Recipe(epochs=2, batch_size=16, learning_rate=5e-3, train=128, test=64),
    ),
    "default": Config(),
    # Li et al., 2022: BERT-large, batches of 1024 rows, 2M steps with 10,000 of warmup, 128 to 512 tokens over all steps;
    # the task's numbers are Devlin et al.'s, 2018, appendix A.3.
    "paper": Config(
        vocab_size=30522,
        length=512,
        batch_size=1024,
        accumulate=16,
        steps=2_000_000,
        model=ModelConfig(
            num_layers=24, d_model=1024, num_heads=16, dropout=0.1, dtype="bfloat16", remat="full"
        ),
        ltd=Dropping(min_value=128, seq_per_step=16, share=1.0),
        learning_rate=1e-4,
        warmup=0.005,
        search=Search(points=1),
        early=Early(seeds=0),
        optimizer=AdamWConfig(b2=0.999, weight_decay=0.01),
        eval_every=10_000,
        eval_batches=20,
        passage=512,
        finetune=Recipe(epochs=3, batch_size=32, learning_rate=5e-5, train=1000, test=1000),
    ),
}

FREE = ("seeds", "out", "resume", "cache")


def run(config: Config) -> Result:
    """Pretrains and fine-tunes as ``config`` says and fills the run folder.

    Args:
        config: What to do.

    Returns:
        The named figures.

    Raises:
        ValueError: If parts of the config do not fit each other or the corpus; or ``resume`` is set and the folder is of
            another config.
        FileExistsError: If ``out`` already holds a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
        TrainingDivergedError: If loss or gradient of a compared run is not finite for ten steps; with ``resume`` it is so
            again. In the search and in the first steps at a high learning rate that is a result.
    """
    # Importing what only a run needs here keeps --help quick.
    from effscale.data import unigram_entropy
    from effscale.experiments import random_ltd_bert_report as bert_report
    from effscale.experiments import random_ltd_report as report
    from effscale.experiments.finetune_passages import FineTuning
    from effscale.experiments.random_ltd_bert_data import passages_data
    from effscale.experiments.random_ltd_bert_runner import Pretraining
    from effscale.training import RunFolder

    began = time.perf_counter()
    # What cannot work is refused before anything is written.
    check_folder(config, FREE)
    corpora, weights = prepared_corpora(config)
    passages = passages_data(corpora, config)
    pretraining = {arm: Pretraining(arm, config, corpora, weights) for arm in ARMS}
    fine_tuning = FineTuning(config, passages)
    folder = RunFolder.create(
        config.out,
        name="random_ltd_bert",
        config=config,
        data=corpus_digests(corpora),
        resume=config.resume,
    )
    found: dict[str, Found] = {}
    early_losses: dict[str, list[float]] = {}
    try:
        with resumable(folder):
            for name, arm in pretraining.items():
                found[name] = arm.search(folder)
            for seed in range(config.seeds):
                for name, arm in pretraining.items():
                    arm.run(folder, seed, found[name].best)
                for name in ARMS:
                    fine_tuning.run(folder, f"seed-{seed}/{name}", seed)
                fine_tuning.run(folder, f"seed-{seed}/scratch", seed, like=f"seed-{seed}/{ARMS[0]}")
            for name, arm in pretraining.items():
                early_losses[name] = [arm.early(folder, seed) for seed in range(config.early.seeds)]
    finally:
        for arm in pretraining.values():
            arm.step.close()

    seeds = range(config.seeds)
    runs: dict[str, report.ArmRuns] = {
        name: report.ArmRuns.read([folder.path / arm.name_of(seed) for seed in seeds], arm.arm)
        for name, arm in pretraining.items()
    }
    accuracies: dict[str, Any] = {
        start: report.last_values(
            [folder.path / f"seed-{seed}/{start}/passages" for seed in seeds], "test_accuracy"
        )
        for start in (*ARMS, "scratch")
    }
    entropy = unigram_entropy([corpus.validation for corpus in corpora])
    losses: dict[str, Any] = {name: arm_runs.last("val_loss") for name, arm_runs in runs.items()}
    early: dict[str, Any] = {name: np.array(each) for name, each in early_losses.items()}
    costs = report.cost_figures(runs)
    figures = {
        "unigram_entropy": entropy,
        "majority": passages.majority,
        "test_size": len(passages.test),
        "steps": config.steps,
        **report.quality_figures(losses, "val_loss"),
        **report.quality_figures(accuracies, "accuracy"),
        **bert_report.early_figures(early, entropy),
        **bert_report.search_figures(found),
        **costs,
    }
    report.draw(
        folder.figures / "loss.png",
        runs,
        "part_val_loss",
        label="loss on a part of the held-out text",
        after=("accuracy: which document?", accuracies),
    )
    percent: dict[str, Any] = {name: 100 * values for name, values in accuracies.items()}
    tables = {
        "Validation loss in nats a hidden token, all tokens kept": report.quality_rows(
            losses, decimals=3
        ),
        "Test accuracy after fine-tuning, in percent": report.quality_rows(percent, decimals=1),
        "What pretraining costs": report.cost_rows(costs),
        "Search": bert_report.search_rows(found),
    }
    if config.search.points > 1:
        tables["Loss of every run of the search"] = bert_report.tried_rows(found)
    if config.early.seeds:
        first = f"The first {config.early.steps} steps at {config.early.learning_rate:g}"
        title = f"{first}: loss then on a part of the held-out text"
        tables[title] = bert_report.early_rows(early, entropy)
    each = {"val_loss": losses, "accuracy": accuracies, "early_val_loss": early}
    seeds_of = bert_report.each_seed(each)
    return finish(folder, "random_ltd_bert", figures, tables, seeds=seeds_of, began=began)


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    with messages():
        name = "python -m effscale.experiments.random_ltd_bert"
        config = parse(PRESETS, __doc__ or "", argv, name=name)
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()
