"""Pretrain a small BERT on real text with and without random-LTD, for the same number of steps, then fine-tune both
on a task.

With random-LTD, all layers except the first and the last process a quarter of a row's tokens at first, and nearly all
of them at the end: all would be kept after the last step. Both arms get the same rows with the same tokens masked.
The tokens that a layer keeps are drawn independently of the mask, as in the paper; masked tokens that are not kept
bypass the layer.

Then each model, and one that was not pretrained, learns to classify which document a passage comes from. The
experiment measures whether the model is as good, and what is saved.

Both arms get the same tuning: the learning rate warms up by steps, and a search with the same rule, with a seed that
is not used in the comparison, finds each arm's peak and warmup. Both arms also run the first steps at a high learning
rate, with more seeds, to test whether one is more stable than the other.

    python -m effscale.experiments.random_ltd_bert
    python -m effscale.experiments.random_ltd_bert --corpus 'text:books/*.txt' --classes 6 --steps 2000
    python -m effscale.experiments.random_ltd_bert --out runs/mine --resume

The default corpus is the standard library of the running Python, so nothing is downloaded. Each pretrained model is
a Hugging Face folder, ``<arm>/seed-<n>/pretrained`` in the run folder.

References:
    Yao et al., "Random-LTD: Random and Layerwise Token Dropping Brings Efficient Training for Large-Scale Transformers"
        (2022). https://arxiv.org/abs/2211.11586
"""

import dataclasses
import functools
import math
from typing import Annotated, Any

from flax import nnx

from effscale.data import unigram_entropy
from effscale.experiments.shared.bert import ModelConfig
from effscale.experiments.shared.classifier.model import classifier
from effscale.experiments.shared.classifier.passages import fine_tuning
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.config_parts import CorporaPart
from effscale.experiments.shared.dropping import ARMS, COLUMNS, Dropping, Plan, compared
from effscale.experiments.shared.prepared import Text, prepared_corpora
from effscale.interop import save_pretrained
from effscale.models import Transformer
from effscale.options import Bounds, NonNegativeInt, Options, PositiveFloat, PositiveInt, check
from effscale.run import Run
from effscale.study import Arm, Curves, Finals, Point, Results, Search, Study, Trial, command
from effscale.study.folder import StudyPart
from effscale.training import AdamWConfig, Clip, Evaluation, masked_token_loss

HIDDEN = 0.15
"""Fraction of the tokens to predict: 80 percent of them are masked, 10 percent replaced, 10 percent unchanged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Early(Options):
    """The first steps of both arms at a high learning rate."""

    seeds: NonNegativeInt = 8
    """Number of runs per arm, with seeds 0, 1, ...; 0 skips this part."""
    steps: PositiveInt = 200
    """Number of steps of each run; the schedule is that of a whole run, cut off here."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StudyPart, CorporaPart):
    """Options of the study; every field is a command-line option."""

    vocab_size: PositiveInt = 512
    """Vocabulary size of the byte-level BPE that is trained on the corpus; the mask token is added to it."""
    length: PositiveInt = 128
    """Sequence length: tokens per row, and positions of the model."""
    batch_size: PositiveInt = 16
    """Rows per batch."""
    accumulate: PositiveInt = 1
    """Number of micro-batches that a batch is split into, to save memory."""
    steps: PositiveInt = 600
    """Optimizer steps of pretraining."""
    model: ModelConfig = ModelConfig()
    """The model."""
    ltd: Dropping = Dropping(min_value=32, seq_per_step=16, share=1.0)
    """Schedule of random-LTD; with share 1, no step keeps all tokens."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate at the start of the search: a linear warmup by steps, then a linear decay by layer tokens to a tenth."""
    warmup: Annotated[float, Bounds(at_least=0, below=1)] = 0.1
    """Fraction of the steps used for warmup, at the start of the search."""
    b2: Annotated[float, Bounds(at_least=0, below=1)] = 0.98
    """Decay rate of AdamW's variance in pretraining."""
    search: Search = Search(learning_rate_factor=2.0, points=10)
    """The search for each arm's learning rate and warmup."""
    early: Early = Early()
    """The test of the first steps at a high learning rate."""
    eval_every: PositiveInt = 100
    """Steps between evaluations on part of the held-out text, and between checkpoints; the last evaluation is on all of it."""
    eval_batches: PositiveInt = 20
    """Number of batches in that part."""
    classes: Annotated[int, Bounds(at_least=2)] = 20
    """Number of documents (the largest ones) in the task, which is to classify the document a passage comes from."""
    passage: PositiveInt = 32
    """Tokens per passage."""
    finetune: Recipe = Recipe(epochs=4, batch_size=32, learning_rate=5e-4, train=1000, test=1000)
    """Fine-tuning on the task; ``train`` and ``test`` count passages over all classes."""

    def __post_init__(self):
        super().__post_init__()
        divisor = f"a divisor of batch_size={self.batch_size}"
        check(self, self.batch_size % self.accumulate == 0, "accumulate", divisor)
        for seeds in (self.seeds, self.early.seeds):
            self.search.check_apart(seeds)
        within = self.early.seeds == 0 or self.early.steps <= self.steps
        check(self.early, within, "steps", f"at most the steps={self.steps} of a whole run")
        row = f"at most the {self.length} tokens of a row"
        check(self, self.passage <= self.length, "passage", row)
        for name in ("train", "test"):
            count = getattr(self.finetune, name)
            each = f"a number of passages, at least classes={self.classes}"
            check(self.finetune, count is not None and count >= self.classes, name, each)
        plan(self, "random_ltd", self.vocab_size)  # raises for an invalid model or schedule

    @property
    def start(self) -> Point:
        """The point where the search begins."""
        return Point(self.learning_rate, round(self.warmup * self.steps))


def plan(config: Config, arm: str, vocab_size: int) -> Plan:
    """Return the tokens that the layers of an arm process; the vocabulary gets a mask token."""
    return Plan(
        arm=arm,
        model=config.model.build(vocab_size + 1, config.length),
        dropping=config.ltd,
        length=config.length,
        batch_size=config.batch_size,
        num_steps=config.steps,
    )


def rate(plan: Plan, point: Point) -> dict[str, float | int]:
    """Return the learning rate with a peak and a warmup."""
    return plan.rate(point.learning_rate, point.warmup, final=point.learning_rate / 10)


def run(config: Config, plan: Plan, text: Text | None = None) -> Run:
    """Return the pretraining of an arm; without a text only to be lowered."""
    described = plan.run(
        Run(
            model=lambda key: Transformer(plan.model, rngs=nnx.Rngs(key)),
            loss=masked_token_loss,
            clip=Clip(1.0),
            accumulate=config.accumulate,
            num_steps=config.steps,
            checkpoint_every=config.eval_every,
        ),
        AdamWConfig(b2=config.b2, weight_decay=0.01),
        rate(plan, config.start),
    )
    if text is None:
        return described
    # grain is slow to import, and --help does not need it.
    from effscale.experiments.shared.masked_text import hidden_rows

    rows = functools.partial(
        hidden_rows,
        tuple(text.corpora),
        text.weights,
        length=config.length,
        batch_size=config.batch_size,
        hidden=HIDDEN,
    )
    return dataclasses.replace(
        described,
        data=lambda seed: rows(validation=False, seed=seed),
        evaluation=Evaluation(
            data=lambda: rows(validation=True, seed=0),  # the same masked tokens for all
            loss=masked_token_loss,
            every=config.eval_every,
            batches=config.eval_batches,
        ),
    )


def study(config: Config) -> Study:
    """Return the comparison."""
    from effscale.experiments.shared.masked_text import passages_data, with_mask

    text = Text(*prepared_corpora(config))
    passages = passages_data(tuple(text.corpora), config)
    plans = {name: plan(config, name, text.vocab_size) for name in ARMS}
    runs = {name: run(config, plans[name], text) for name in ARMS}
    untrained = lambda key: Transformer(plans["baseline"].model, rngs=nnx.Rngs(key))
    tune = fine_tuning(passages, config.finetune, untrained)

    def pretrained(name: str) -> Arm:
        def train(trial: Trial) -> dict[str, Any]:
            assert trial.point is not None
            options: Any = {"hyperparams": rate(plans[name], trial.point)}
            metrics = trial.fit(runs[name], keep_model=not trial.tuning, **options)
            if trial.tuning:
                return metrics
            model = trial.model(runs[name])
            save_pretrained(model, trial.place / "pretrained", tokenizer=with_mask(text.tokenizer))
            model = classifier(model, passages.num_classes, trial.seed)
            task = trial.fit(tune, "passages", model=model)
            return {**metrics, "accuracy": task["test_accuracy"], **plans[name].costs}

        return Arm(about=ARMS[name], train=train, start=config.start)

    def from_scratch(trial: Trial) -> dict[str, Any]:
        return {"accuracy": trial.fit(tune, "passages")["test_accuracy"]}

    def early(name: str) -> Arm:
        begun = dataclasses.replace(runs[name], num_steps=config.early.steps)
        point = config.start._replace(learning_rate=config.early.learning_rate)
        options: Any = {"hyperparams": rate(plans[name], point)}
        return Arm(
            about=f"{ARMS[name]}, {config.early.steps} steps at {config.early.learning_rate:g}",
            train=lambda trial: trial.fit(begun, **options),
            against="baseline_early",
            seeds=config.early.seeds,
        )

    arms = {name: pretrained(name) for name in ARMS}
    arms["scratch"] = Arm(about="random weights", train=from_scratch)
    if config.early.seeds:
        arms |= {f"{name}_early": early(name) for name in ARMS}
    entropy = unigram_entropy(text.validation)
    return Study(
        name="random_ltd_bert",
        data=text.digests(),
        arms=arms,
        baseline="baseline",
        search=config.search,
        columns={"accuracy": "accuracy on the task", **COLUMNS},
        plots=(
            Curves(
                name="loss",
                over="tokens",
                arms=tuple(ARMS),
                labels=("layer tokens", "loss on part of the held-out text (nats per token)"),
            ),
            Finals(name="losses", label="final loss (nats per hidden token)"),
            Finals(name="accuracies", metric="accuracy", label="accuracy on the task"),
        ),
        figures=lambda results: {
            "unigram_entropy": entropy,
            "majority": passages.majority,
            "test_size": len(passages.test),
            "steps": config.steps,
            **compared(results, "val_loss", "accuracy"),
            **not_below(entropy, results),
        },
    )


def not_below(entropy: float, results: Results) -> dict[str, int]:
    """Return in how many runs of the first steps the model learned nothing beyond the frequency of tokens, or diverged."""
    early = [name for name in results.study.arms if name.endswith("_early")]
    values = {name: results.table.values(name, "val_loss").values() for name in early}
    above = lambda loss: math.isnan(loss) or loss >= entropy
    return {f"{name}_not_below_entropy": sum(map(above, values[name])) for name in early}


PRESETS = {
    "smoke": Config(
        seeds=1,
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
    # Li et al., 2022: BERT-large, batches of 1024 rows, 2M steps with 10,000 of warmup, 128 to 512 tokens over all
    # steps; the settings of the task are from Devlin et al., 2018, appendix A.3.
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
        b2=0.999,
        search=Search(points=1),
        early=Early(seeds=0),
        eval_every=10_000,
        passage=512,
        finetune=Recipe(epochs=3, batch_size=32, learning_rate=5e-5, train=1000, test=1000),
    ),
}


main = functools.partial(command.main, PRESETS, study, __doc__ or "")

if __name__ == "__main__":
    main()
