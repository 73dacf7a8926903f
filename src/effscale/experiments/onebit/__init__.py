"""Pretrain a small GPT and a small BERT on real text with workers that exchange one bit per parameter.

Each 1-bit optimizer is compared with its uncompressed baseline: same initial weights, same rows, same number of
steps. Adam on one-bit gradients, which fails according to the papers, is an arm as well. Then each model, and one that
was not pretrained, learns to classify which document a passage comes from. The experiment measures whether the model
is as good, and how much data was sent.

    python -m effscale.experiments.onebit
    python -m effscale.experiments.onebit --arms gpt_adam gpt_onebit_adam --gpt.steps 1000
    python -m effscale.experiments.onebit --out runs/mine --resume

The workers are simulated on one device, with the same collectives as on separate devices. The default corpus is
the standard library of the running Python, so nothing is downloaded.

References:
    Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed" (2021).
        https://arxiv.org/abs/2102.02888
    Li et al., "1-bit LAMB: Communication Efficient Large-Scale Large-Batch Training with LAMB's Convergence Speed"
        (2021). https://arxiv.org/abs/2104.06069
    Lu et al., "Maximizing Communication Efficiency for Large-scale Training via 0/1 Adam" (2022).
        https://arxiv.org/abs/2202.06009
"""

import dataclasses
import functools
import math
from typing import Annotated, Any, Literal, get_args

from flax import nnx

from effscale.data import unigram_entropy
from effscale.experiments.onebit.optimizers import (
    ONEBIT_ADAM_FREEZE,
    Optimization,
    OptimizerName,
    ZeroOne,
)
from effscale.experiments.shared import bert, gpt
from effscale.experiments.shared.classifier.model import classifier
from effscale.experiments.shared.classifier.passages import fine_tuning
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.config_parts import CorporaPart
from effscale.experiments.shared.prepared import Text, prepared_corpora
from effscale.models import Transformer, TransformerConfig
from effscale.optim import Workers
from effscale.options import Bounds, PositiveInt, check
from effscale.parallel import MeshConfig
from effscale.run import Run
from effscale.study import Arm, Curves, Finals, Results, Study, Tradeoff, Trial, command
from effscale.study.folder import StudyPart
from effscale.training import Evaluation, masked_token_loss, next_token_loss, read_jsonl

Task = Literal["gpt", "bert"]
TASKS: tuple[Task, ...] = get_args(Task)
NAMES: dict[OptimizerName, str] = {
    "adam": "Adam",
    "onebit_adam": "1-bit Adam",
    "zero_one_adam": "0/1 Adam",
    "naive": "naive 1-bit gradients",
    "lamb": "LAMB",
    "onebit_lamb": "1-bit LAMB",
}
"""The name of each optimizer in tables and figures."""
TWINS: dict[OptimizerName, OptimizerName] = {
    "onebit_adam": "adam",
    "zero_one_adam": "adam",
    "naive": "adam",
    "onebit_lamb": "lamb",
}
"""The uncompressed baseline of each optimizer."""

HIDDEN = 0.15  # of the tokens, which BERT predicts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining(Optimization):
    """Options of pretraining; each task has its own ``model``."""

    length: PositiveInt = 128
    """Sequence length: tokens per row, and positions of the model."""
    batch_size: PositiveInt = 16
    """Rows per batch, over all workers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainGPT(Pretraining):
    """Pretraining of a GPT: predict the next token."""

    model: gpt.ModelConfig = gpt.ModelConfig(d_model=128)
    """The model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainBERT(Pretraining):
    """Pretraining of a BERT: predict masked tokens."""

    model: bert.ModelConfig = bert.ModelConfig(num_layers=4)
    """The model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StudyPart, CorporaPart):
    """Options of the study; every field is a command-line option."""

    workers: Annotated[int, Bounds(at_least=2)] = 4
    """Number of workers that share a batch."""
    gpt: PretrainGPT = PretrainGPT(steps=500, adam_rate=2e-3, lamb_rate=3e-2)
    """Pretraining of the GPT."""
    bert: PretrainBERT = PretrainBERT(
        steps=2000,
        adam_rate=5e-4,
        lamb_rate=5e-3,
        zero_one=ZeroOne(var_freeze=ONEBIT_ADAM_FREEZE, var_decay="step", local_step_clipper=2),
    )
    """Pretraining of the BERT, with half of its best learning rates and with the stages that 0/1 Adam needs; the experiment's page explains why."""
    vocab_size: PositiveInt = 512
    """Vocabulary size of the byte-level BPE that is trained on the corpus; BERT's mask token is added to it."""
    eval_every: PositiveInt = 100
    """Steps between evaluations on part of the held-out text, and between checkpoints; the last evaluation is on all of it."""
    eval_batches: PositiveInt = 20
    """Number of batches in that part."""
    classes: Annotated[int, Bounds(at_least=2)] = 20
    """Number of documents (the largest ones) in the task, which is to classify the document a passage comes from."""
    passage: PositiveInt = 32
    """Tokens per passage."""
    finetune: Recipe = Recipe(epochs=4, batch_size=32, learning_rate=5e-4, train=1000, test=1000)
    """Fine-tuning on the task, uncompressed; ``train`` and ``test`` count passages over all classes."""

    def __post_init__(self):
        super().__post_init__()
        for plan in (self.gpt, self.bert):
            multiple = f"a multiple of workers={self.workers}"
            check(plan, plan.batch_size % self.workers == 0, "batch_size", multiple)
            row = f"at most the {plan.length} tokens of a row"
            check(self, self.passage <= plan.length, "passage", row)
            plan.model.build(self.vocab_size, plan.length)  # raises for an invalid model
        for name in ("train", "test"):
            count = getattr(self.finetune, name)
            each = f"a number of passages, at least classes={self.classes}"
            check(self.finetune, count is not None and count >= self.classes, name, each)


PRESETS = {
    "smoke": Config(
        arms=("gpt_adam", "gpt_onebit_adam", "gpt_scratch"),
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
    # all. `make aot` compiles its step on a mesh, with a worker per device.
    "paper": Config(
        workers=64,
        gpt=PretrainGPT(
            steps=300_000,
            length=1024,
            batch_size=512,
            adam_rate=1.5e-4,
            lamb_rate=1e-2,
            final=1 / 15,
            b2=0.999,
            factor_max=4.0,
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
            b2=0.999,
            factor_max=4.0,
            model=bert.ModelConfig(
                num_layers=24,
                d_model=1024,
                num_heads=16,
                dropout=0.1,
                dtype="bfloat16",
                remat="full",
            ),
        ),
        vocab_size=30522,
        eval_every=5000,
        passage=128,
        finetune=Recipe(epochs=3, batch_size=32, learning_rate=5e-5, train=1000, test=1000),
    ),
}


def transformer(config: Config, task: Task, vocab_size: int) -> TransformerConfig:
    """Return the model of a task; BERT has a mask token in addition to the vocabulary."""
    plan = getattr(config, task)
    return plan.model.build(vocab_size + (task == "bert"), plan.length)


def rows(config: Config, task: Task, text: Text, seed: int, held_out: bool = False) -> Any:
    """Return the batches of a task: of the training text endlessly, or of the held-out text once, the same for all seeds."""
    # grain is slow to import, and --help does not need it.
    from effscale.data import make_dataset
    from effscale.experiments.shared.masked_text import hidden_rows

    plan = getattr(config, task)
    shape: Any = {"length": plan.length, "batch_size": plan.batch_size, "seed": seed}
    if task == "bert":
        corpora: Any = (tuple(text.corpora), text.weights)
        return hidden_rows(*corpora, validation=held_out, hidden=HIDDEN, **shape)
    if held_out:
        whole: Any = {"shuffle": False, "num_epochs": 1, "remainder": "pad"}
        return make_dataset(text.validation, **whole, **shape)
    return make_dataset(text.train, weights=text.weights, **shape)


def run(config: Config, task: Task, name: OptimizerName, text: Text | None = None) -> Run:
    """Return the pretraining of an arm; without a text only to be lowered, for a worker per device."""
    plan, loss = getattr(config, task), next_token_loss if task == "gpt" else masked_token_loss
    model = transformer(config, task, text.vocab_size if text else config.vocab_size)
    workers = Workers("data", num_workers=config.workers if text else None)
    described = Run(
        model=lambda key: Transformer(model, rngs=nnx.Rngs(key)),
        num_steps=plan.steps,
        loss=loss,
        optimizer=plan.build(name, workers),
        learning_rate=plan.learning_rate(name),
        workers=workers,
        checkpoint_every=config.eval_every,
        mesh=None if text else MeshConfig(),
    )
    if text is None:
        return described
    return dataclasses.replace(
        described,
        data=functools.partial(rows, config, task, text),
        evaluation=Evaluation(
            data=functools.partial(rows, config, task, text, 0, held_out=True),
            loss=loss,
            every=config.eval_every,
            batches=config.eval_batches,
        ),
    )


def study(config: Config) -> Study:
    """Return the comparison."""
    from effscale.experiments.shared.masked_text import passages_data

    text = Text(*prepared_corpora(config))
    passages = passages_data(tuple(text.corpora), config)

    def arms_of(task: Task) -> dict[str, Arm]:
        model = transformer(config, task, text.vocab_size)
        random = lambda key: Transformer(model, rngs=nnx.Rngs(key))
        tune = fine_tuning(passages, config.finetune, random)

        def accuracy(trial: Trial, model: Any = None) -> dict[str, Any]:
            found = trial.fit(tune, "passages", model=model)["test_accuracy"]
            return {"accuracy": found}

        def arm(name: OptimizerName) -> Arm:
            pretraining = run(config, task, name, text)

            def train(trial: Trial) -> dict[str, Any]:
                metrics = trial.fit(pretraining, keep_model=True)
                records = read_jsonl(trial.place / "metrics.jsonl")
                sent = [record["sent_bytes"] for record in records if "sent_bytes" in record]
                costs = {
                    "megabytes": sum(sent) / 1e6,
                    "rounds": sum(number > 0 for number in sent),
                }
                model = classifier(trial.model(pretraining), config.classes, trial.seed)
                return metrics | costs | accuracy(trial, model)

            against = f"{task}_{TWINS.get(name, name)}"
            return Arm(about=f"{task.upper()}, {NAMES[name]}", train=train, against=against)

        scratch = f"{task}_scratch"
        about = f"{task.upper()}, random weights"
        return {f"{task}_{name}": arm(name) for name in NAMES} | {
            scratch: Arm(about=about, train=accuracy, against=scratch)
        }

    arms = {name: arm for task in TASKS for name, arm in arms_of(task).items()}
    used = [task for task in TASKS if any(a.startswith(task) for a in config.arms or arms)]
    return Study(
        name="onebit",
        data=text.digests(),
        arms=arms,
        baseline="gpt_adam",
        columns={
            "accuracy": "accuracy after fine-tuning",
            "megabytes": "MB sent",
            "rounds": "rounds",
            "updates": "updates",
            "tokens": "tokens",
            "step_seconds": "seconds",
        },
        plots=(
            *(plot for task in used for plot in plots_of(task)),
            Finals(name="accuracy", metric="accuracy", label="accuracy after fine-tuning"),
        ),
        figures=lambda results: {
            "unigram_entropy": unigram_entropy(text.validation),
            "majority": passages.majority,
            "test_size": len(passages.test),
            **times_less_sent(results),
        },
    )


def plots_of(task: Task) -> list[Any]:
    """Return the figures of a task. Compressed gradients, which fail, do not set the frame of the differences."""
    names = tuple(f"{task}_{name}" for name in NAMES)
    equal = tuple(f"{task}_{name}" for name in TWINS if name != "naive")
    loss = "loss on part of the held-out text (nats per token)"
    return [
        Curves(name=task, arms=names, labels=("step", loss)),
        Curves(
            name=f"{task}_differences",
            arms=equal,
            minus=True,
            labels=("step", "loss minus that of the baseline (nats per token)"),
        ),
        Tradeoff(
            name=f"{task}_sent",
            over="megabytes",
            arms=names,
            logarithmic=True,
            labels=("MB sent by each worker", "final loss (nats per token)"),
        ),
    ]


def times_less_sent(results: Results) -> dict[str, float]:
    """Return how many times less each 1-bit optimizer sends than its baseline, unless one of them diverged with all seeds."""
    found = {}
    for name in results.study.arms:
        twin = results.study.against(name)
        if twin is not None:
            less = sent(results, twin) / sent(results, name)
            found |= {} if math.isnan(less) else {f"{name}_times_less_sent": less}
    return found


def sent(results: Results, arm: str) -> float:
    """Return the megabytes that each worker sent; NaN if it diverged with all seeds."""
    return results.table.interval(arm, "megabytes").mean


main = functools.partial(command.main, PRESETS, study, __doc__ or "")
