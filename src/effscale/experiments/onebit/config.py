"""Config and presets of the experiment ``onebit``."""

import dataclasses
import pathlib
from typing import Literal

from effscale.experiments.onebit.optimizers import OPTIMIZERS, TWINS, Moments, OptimizerName, Stages
from effscale.experiments.shared import bert, gpt
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.config_parts import PassagePart
from effscale.models.validation import check, check_finite
from effscale.study.folder import OUTPUT
from effscale.training import AdamWConfig

Task = Literal["gpt", "bert"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Options of pretraining; each task has its own ``model``."""

    steps: int
    """Optimizer steps of pretraining."""
    length: int = 128
    """Sequence length: tokens per row, and positions of the model."""
    batch_size: int = 16
    """Rows per batch, over all workers."""
    accumulate: int = 1
    """Number of micro-batches that a worker's part of a batch is split into, to save memory."""
    adam_rate: float
    """Peak learning rate of all optimizers except the LAMB ones."""
    lamb_rate: float
    """Peak learning rate of the LAMB optimizers."""
    final: float = 0.0
    """Final learning rate, as a fraction of the peak."""
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
    """Pretraining of a GPT: predict the next token."""

    model: gpt.ModelConfig = gpt.ModelConfig(d_model=128)
    """The model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainBERT(Pretrain):
    """Pretraining of a BERT: predict masked tokens."""

    model: bert.ModelConfig = bert.ModelConfig(num_layers=4)
    """The model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PassagePart):
    """Options of a run; every field is a command-line option."""

    tasks: tuple[Task, ...] = ("gpt", "bert")
    """Models to pretrain."""
    optimizers: tuple[OptimizerName, ...] = OPTIMIZERS
    """Optimizers to compare. Each needs its uncompressed baseline: adam for onebit_adam, zero_one_adam and naive; lamb for onebit_lamb."""
    workers: int = 4
    """Number of workers that share a batch."""
    gpt: PretrainGPT = PretrainGPT(steps=500, adam_rate=2e-3, lamb_rate=3e-2)
    """Pretraining of the GPT."""
    bert: PretrainBERT = PretrainBERT(
        steps=2000,
        adam_rate=5e-4,
        lamb_rate=5e-3,
        stages=Stages(zero_one_adam=23 / 152, var_decay="step", local_step_clipper=2),
    )
    """Pretraining of the BERT, with half of its best learning rates and with the stages that 0/1 Adam needs; the experiment's page explains why."""
    moments: Moments = Moments()
    """Options that all optimizers share."""
    seeds: int = 3
    """Number of runs of each kind. Seeds 0, 1, ... decide the initial weights, the order of rows and which tokens are masked."""
    vocab_size: int = 512
    """Vocabulary size of the byte-level BPE that is trained on the corpus; BERT's mask token is added to it."""
    hidden: float = 0.15
    """Fraction of the tokens that BERT predicts: 80 percent of them are masked, 10 percent replaced, 10 percent unchanged."""
    finetune: Recipe = PassagePart.finetune
    """Fine-tuning on the task, uncompressed; ``train`` and ``test`` count passages over all classes."""
    optimizer: AdamWConfig = PassagePart.optimizer
    """AdamW options of fine-tuning."""
    warmup: float = 0.1
    """Fraction of the fine-tuning steps used for warmup."""
    clip_norm: float = 1.0
    """Maximum norm of the gradient in fine-tuning."""
    out: pathlib.Path | None = None
    """Run folder; the default is runs/onebit/<time>."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("tasks", "optimizers"):
            values = getattr(self, name)
            good = len(values) >= 1 and len(set(values)) == len(values)
            check(self, good, name, "one or more different names")
        missing = [
            TWINS[o] for o in self.optimizers if o in TWINS and TWINS[o] not in self.optimizers
        ]
        wanted = f"a list that includes their uncompressed baselines, {', '.join(dict.fromkeys(missing))}"
        check(self, not missing, "optimizers", wanted)
        check(
            self, self.workers >= 2, "workers", "at least 2, because a single worker sends nothing"
        )
        for task in self.tasks:
            plan = getattr(self, task)
            parts = self.workers * plan.accumulate
            divisor = f"a multiple of workers x accumulate = {parts}"
            check(plan, plan.batch_size % parts == 0, "batch_size", divisor)
            row = f"at most the {plan.length} tokens of a row"
            check(self, self.passage <= plan.length, "passage", row)
            plan.model.build(self.vocab_size, plan.length)  # raises for an invalid model
        check(self, 0 < self.hidden < 1, "hidden", "between 0 and 1")


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
            model=gpt.ModelConfig(num_layers=2, d_model=32, num_heads=2),
        ),
        bert=PretrainBERT(
            steps=24,
            length=32,
            batch_size=8,
            adam_rate=5e-3,
            lamb_rate=2e-2,
            model=bert.ModelConfig(num_layers=2, d_model=32, num_heads=2),
        ),
        eval_every=12,
        eval_batches=2,
        classes=4,
        finetune=Recipe(epochs=1, batch_size=16, learning_rate=5e-3, train=64, test=64),
    ),
    "default": Config(),
    # The papers' BERT-Large at 128 tokens, in 152,000 batches of 4,096 rows, and a GPT-2 with 117M parameters, which
    # the 0/1 Adam paper also pretrained; its settings here are Megatron's. 64 workers. 1-bit LAMB's own batches have
    # 65,536 rows, at a learning rate of 11e-3; here its rate is lower by the square root of the ratio of batch sizes,
    # and the bound of its coefficient is not their 0.3. Clipping uses the gradient norm of a worker's rows, not of
    # all. `make aot` compiles its step on a mesh, with per_worker.
    "paper": Config(
        workers=64,
        gpt=PretrainGPT(
            steps=300_000,
            length=1024,
            batch_size=512,
            adam_rate=1.5e-4,
            lamb_rate=1e-2,
            final=1 / 15,
            model=gpt.ModelConfig(
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
            model=bert.ModelConfig(
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

FREE = ("tasks", "optimizers", "seeds", *OUTPUT, "cache")
