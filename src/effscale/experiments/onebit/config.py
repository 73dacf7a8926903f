"""What the experiment ``onebit`` can be told, and its presets."""

import dataclasses
import pathlib
from typing import Literal

from effscale.experiments.onebit.optimizers import OPTIMIZERS, TWINS, Moments, OptimizerName, Stages
from effscale.experiments.shared import bert, gpt
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.config_parts import PassagePart
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

    model: gpt.ModelConfig = gpt.ModelConfig(d_model=128)
    """The model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainBERT(Pretrain):
    """A BERT's: tell hidden tokens."""

    model: bert.ModelConfig = bert.ModelConfig(num_layers=4)
    """The model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PassagePart):
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
    seeds: int = 3
    """Runs of each kind; seeds 0, 1, ... decide initial weights, the order of rows and the tokens hidden."""
    vocab_size: int = 512
    """Size of the byte-level BPE that is trained on the corpus; BERT's mask token comes on top."""
    hidden: float = 0.15
    """Share of the tokens that BERT is to tell: 80 percent of them masked, 10 percent replaced, 10 percent left."""
    finetune: Recipe = PassagePart.finetune
    """How the task is learned, uncompressed; ``train`` and ``test`` passages of all classes together."""
    optimizer: AdamWConfig = PassagePart.optimizer
    """AdamW of the fine-tuning."""
    warmup: float = 0.1
    """Share of the steps of the fine-tuning in which the learning rate rises."""
    clip_norm: float = 1.0
    """Greatest norm of the gradient in fine-tuning."""
    out: pathlib.Path | None = None
    """Folder of the run; by default runs/onebit/<time>."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("tasks", "optimizers"):
            values = getattr(self, name)
            good = len(values) >= 1 and len(set(values)) == len(values)
            check(self, good, name, "one or more different names")
        missing = [
            TWINS[o] for o in self.optimizers if o in TWINS and TWINS[o] not in self.optimizers
        ]
        wanted = f"with what they are compared with, {', '.join(dict.fromkeys(missing))}"
        check(self, not missing, "optimizers", wanted)
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

FREE = ("tasks", "optimizers", "seeds", "out", "resume", "cache")
