"""A small GPT and a small BERT learn from real text between workers that send one bit a number.

Each 1-bit optimizer runs beside the uncompressed one that it is to equal: same initial weights, same rows, same number of steps;
and Adam on gradients in one bit beside them, which the papers say fails. Then each model, and one that was not pretrained,
learns which document a passage comes from. What is asked: is the model as good, and how much was sent for it?

    python -m effscale.experiments.onebit
    python -m effscale.experiments.onebit --tasks gpt --optimizers adam onebit_adam --gpt.steps 1000
    python -m effscale.experiments.onebit --out runs/mine --resume

The workers are simulated on one device, with the collectives that as many devices would have. The default corpus is the Python
standard library of the running interpreter, so nothing is downloaded.
"""

import dataclasses
import pathlib
import time
from typing import Literal

from effscale.experiments import quickstart, random_ltd_bert
from effscale.experiments.cli import messages, parse
from effscale.experiments.finetune import Recipe
from effscale.experiments.host import keep_freed_memory
from effscale.experiments.onebit_optimizers import OPTIMIZERS, TWINS, Moments, OptimizerName, Stages
from effscale.experiments.prepared import (
    check_folder,
    corpus_digests,
    prepared_corpora,
    resumable,
)
from effscale.experiments.random_ltd import check_shared
from effscale.experiments.results import Result, finish
from effscale.models.validation import check, check_finite
from effscale.training import AdamWConfig

Task = Literal["gpt", "bert"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain:
    """How a model is pretrained; ``model`` comes with each task."""

    steps: int
    """Batches to pretrain on."""
    length: int = 128
    """Tokens in a row, and positions of the model."""
    batch_size: int = 16
    """Rows in a batch, of all workers together."""
    accumulate: int = 1
    """Micro-batches that a worker's part of a batch is cut into, to save memory."""
    adam_rate: float
    """Peak of the learning rate for all but LAMB's."""
    lamb_rate: float
    """That for LAMB's."""
    final: float = 0.0
    """Share of its peak at which the learning rate ends."""
    stages: Stages = Stages()
    """When compression begins."""

    def __post_init__(self):
        check_finite(self)
        for name in ("steps", "length", "batch_size", "accumulate"):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        for name in ("adam_rate", "lamb_rate"):
            check(self, getattr(self, name) > 0, name, "above 0")
        check(self, 0 <= self.final <= 1, "final", "from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainGPT(Pretrain):
    """A GPT's: tell the next token."""

    model: quickstart.ModelConfig = quickstart.ModelConfig(d_model=128)
    """The model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainBERT(Pretrain):
    """A BERT's: tell hidden tokens."""

    model: random_ltd_bert.ModelConfig = random_ltd_bert.ModelConfig(num_layers=4)
    """The model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the run does; every field is an option of the command line."""

    tasks: tuple[Task, ...] = ("gpt", "bert")
    """What is pretrained."""
    optimizers: tuple[OptimizerName, ...] = OPTIMIZERS
    """By what; each needs its uncompressed twin: adam for onebit_adam, zero_one_adam and naive; lamb for onebit_lamb."""
    workers: int = 4
    """Workers that a batch is divided among."""
    gpt: PretrainGPT = PretrainGPT(steps=500, adam_rate=2e-3, lamb_rate=3e-2)
    """The GPT."""
    bert: PretrainBERT = PretrainBERT(
        steps=2000,
        adam_rate=5e-4,
        lamb_rate=5e-3,
        stages=Stages(zero_one_adam=23 / 152, var_decay="step", local_step_clipper=2),
    )
    """The BERT, at half of its best rates and with 0/1 Adam's stages as it needs them; why is on the experiment's page."""
    moments: Moments = Moments()
    """What all optimizers share."""
    corpus: tuple[str, ...] = ("stdlib",)
    """Sources, each [WEIGHT*]KIND: stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field, hf:NAME_OR_FOLDER#field."""
    seeds: int = 3
    """Runs of each kind; seeds 0, 1, ... decide initial weights, the order of rows and the tokens hidden."""
    vocab_size: int = 512
    """Size of the byte-level BPE that is trained on the corpus; BERT's mask token comes on top."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out."""
    hidden: float = 0.15
    """Share of the tokens that BERT is to tell: 80 percent of them masked, 10 percent replaced, 10 percent left."""
    eval_every: int = 100
    """Steps between evaluations on a part of the held-out text, and between checkpoints; at the end all is taken, too."""
    eval_batches: int = 20
    """Batches in that part."""
    classes: int = 20
    """Documents of the task, the largest ones: which of them is a passage from?"""
    passage: int = 32
    """Tokens of a passage."""
    finetune: Recipe = Recipe(epochs=4, batch_size=32, learning_rate=5e-4, train=1000, test=1000)
    """How the task is learned, uncompressed; ``train`` and ``test`` passages of all classes together."""
    optimizer: AdamWConfig = AdamWConfig(b2=0.98, weight_decay=0.01)
    """AdamW of the fine-tuning."""
    warmup: float = 0.1
    """Share of the steps of the fine-tuning in which the learning rate rises."""
    clip_norm: float = 1.0
    """Greatest norm of the gradient in fine-tuning."""
    out: pathlib.Path | None = None
    """Folder of the run; by default runs/onebit/<time>."""
    resume: bool = False
    """Go on with the run in --out: finished runs are kept, the last one goes on from its checkpoint."""
    cache: pathlib.Path | None = None
    """Where prepared corpora are kept; by default the user's cache folder."""

    def __post_init__(self):
        check(self, len(self.corpus) >= 1, "corpus", "at least one source")
        for name in ("tasks", "optimizers"):
            values = getattr(self, name)
            good = len(values) >= 1 and len(set(values)) == len(values)
            check(self, good, name, "one or more different names")
        missing = [
            TWINS[o] for o in self.optimizers if o in TWINS and TWINS[o] not in self.optimizers
        ]
        wanted = f"with what they are compared with, {', '.join(dict.fromkeys(missing))}"
        check(self, not missing, "optimizers", wanted)
        check_shared(self)
        check(self, 0 < self.validation_fraction < 1, "validation_fraction", "between 0 and 1")
        check(self, self.passage >= 1, "passage", "at least 1")
        check(self, self.workers >= 2, "workers", "at least 2, as one sends nothing")
        for task in self.tasks:
            plan = getattr(self, task)
            parts = self.workers * plan.accumulate
            divisor = f"a multiple of workers x accumulate = {parts}"
            check(plan, plan.batch_size % parts == 0, "batch_size", divisor)
            row = f"at most the {plan.length} tokens of a row"
            check(self, self.passage <= plan.length, "passage", row)
            plan.model.build(self.vocab_size, plan.length)  # an impossible model is refused here
        check(self, 0 < self.hidden < 1, "hidden", "between 0 and 1")
        check(self, self.classes >= 2, "classes", "at least 2")
        for name in ("train", "test"):
            count = getattr(self.finetune, name)
            each = f"a number of passages, at least classes={self.classes}"
            check(self.finetune, count is not None and count >= self.classes, name, each)


PRESETS = {
    "smoke": Config(
        tasks=("gpt",),
        optimizers=("adam", "onebit_adam"),
        seeds=1,
        gpt=PretrainGPT(
            steps=24,
            length=32,
            batch_size=8,
            adam_rate=5e-3,
            lamb_rate=2e-2,
            model=quickstart.ModelConfig(num_layers=2, d_model=32, num_heads=2),
        ),
        bert=PretrainBERT(
            steps=24,
            length=32,
            batch_size=8,
            adam_rate=5e-3,
            lamb_rate=2e-2,
            model=random_ltd_bert.ModelConfig(num_layers=2, d_model=32, num_heads=2),
        ),
        eval_every=12,
        eval_batches=2,
        classes=4,
        finetune=Recipe(epochs=1, batch_size=16, learning_rate=5e-3, train=64, test=64),
    ),
    "default": Config(),
    # The papers' BERT-Large at 128 tokens, in 152,000 batches of 4,096 rows, and a GPT-2 of 117M parameters, which the 0/1 Adam paper
    # pretrained, too; its numbers here are Megatron's. 64 workers. 1-bit LAMB's own batches have 65,536 rows, at a rate of 11e-3; here its
    # rate is less by the root of how much smaller they are, and its coefficient's bound is not their 0.3. The norm that is clipped is that of a worker's rows, not of all. What `make aot` compiles of it is the step on a mesh, per_worker's.
    "paper": Config(
        workers=64,
        gpt=PretrainGPT(
            steps=300_000,
            length=1024,
            batch_size=512,
            adam_rate=1.5e-4,
            lamb_rate=1e-2,
            final=1 / 15,
            model=quickstart.ModelConfig(
                num_layers=12,
                d_model=768,
                num_heads=12,
                dropout=0.1,
                dtype="bfloat16",
                remat="full",
            ),
        ),
        bert=PretrainBERT(
            steps=152_000,
            batch_size=4096,
            adam_rate=4e-4,
            lamb_rate=11e-3 / 4,
            final=1 / 15,
            model=random_ltd_bert.ModelConfig(
                num_layers=24,
                d_model=1024,
                num_heads=16,
                dropout=0.1,
                dtype="bfloat16",
                remat="full",
            ),
        ),
        moments=Moments(b2=0.999, factor_max=4.0),
        vocab_size=30522,
        eval_every=5000,
        passage=128,
        finetune=Recipe(epochs=3, batch_size=32, learning_rate=5e-5, train=1000, test=1000),
    ),
}

FREE = ("tasks", "optimizers", "seeds", "out", "resume", "cache")


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
        TrainingDivergedError: If loss or gradient of a run is not finite for ten steps. With ``resume`` and other
            ``optimizers`` the rest goes on without it.
    """
    # Importing what only a run needs here keeps --help quick.
    from effscale.data import unigram_entropy
    from effscale.experiments import onebit_report as report
    from effscale.experiments.finetune_passages import FineTuning
    from effscale.experiments.onebit_runner import Pretraining
    from effscale.experiments.random_ltd_bert_data import passages_data
    from effscale.training import RunFolder

    began = time.perf_counter()
    # What cannot work is refused before anything is written.
    check_folder(config, FREE)
    corpora, weights = prepared_corpora(config)
    passages = passages_data(corpora, config)
    folder = RunFolder.create(
        config.out,
        name="onebit",
        config=config,
        data=corpus_digests(corpora),
        resume=config.resume,
    )
    with resumable(folder):
        for task in config.tasks:
            fine_tuning = FineTuning(config, passages)
            for name in config.optimizers:
                pretraining = Pretraining(config, task, name, corpora, weights)
                for seed in range(config.seeds):
                    pretraining.run(folder, seed)
                    fine_tuning.run(folder, pretraining.name_of(seed), seed)
            for seed in range(config.seeds):
                like = f"{task}/seed-{seed}/{config.optimizers[0]}"
                fine_tuning.run(folder, f"{task}/seed-{seed}/scratch", seed, like=like)

    runs = {task: report.read(folder.path, task, config) for task in config.tasks}
    figures: dict[str, float | int] = {
        "unigram_entropy": unigram_entropy([corpus.validation for corpus in corpora]),
        "majority": passages.majority,
        "test_size": len(passages.test),
    }
    for task, found in runs.items():
        figures |= report.figures(task, found)
    report.draw(folder.figures / "onebit.png", runs, majority=passages.majority)
    tables = {
        title: rows for task, found in runs.items() for title, rows in report.tables(task, found)
    }
    return finish(folder, "onebit", figures, tables, began=began)


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    with messages():
        config = parse(PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.onebit")
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()
