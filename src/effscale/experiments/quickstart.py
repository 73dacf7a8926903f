"""A small GPT learns from real text, end to end.

Tokenizer, packed data, training with checkpoints, evaluation, figures, generation: every part of the library that
needs no technique, in one script to be read from top to bottom. The default corpus is the Python standard
library of the running interpreter, so nothing is downloaded. ``--technique`` trains with curriculum learning, random-LTD or both;
the experiment ``data_efficiency`` compares them.

    python -m effscale.experiments.quickstart
    python -m effscale.experiments.quickstart --corpus 'text:books/*.txt' --steps 2000
    python -m effscale.experiments.quickstart --technique cl_ltd
    python -m effscale.experiments.quickstart --out runs/mine --resume

A finished or running folder gives its model back: ``model, tokenizer = load("runs/mine")``.
"""

import dataclasses
import os
import pathlib
import signal
import time
from typing import Any, Literal

import jax
import numpy as np
import optax

from effscale.experiments.cli import StoppedBySignal, messages, parse
from effscale.experiments.console import show_results, status
from effscale.experiments.host import keep_freed_memory, peak_memory
from effscale.experiments.prepared import (
    check_folder,
    corpus_digests,
    prepared_corpora,
    resumable,
)
from effscale.experiments.pretraining_plan import (
    CURRICULA,
    DataEfficiencyConfig,
    Plan,
    Technique,
    check_technique,
    make_plan,
)
from effscale.experiments.saved import config_from_json
from effscale.models import Transformer, TransformerConfig, abstract, gpt2
from effscale.models.config import Remat
from effscale.models.validation import check, check_finite, is_integer
from effscale.parallel import MeshConfig, batch_shard, initialize, shard_batch
from effscale.training import AdamWConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A GPT-2 of any size; its vocabulary is the tokenizer's."""

    num_layers: int = 4
    """Layers."""
    d_model: int = 224
    """Width of the residual stream."""
    num_heads: int = 4
    """Attention heads."""
    dropout: float = 0.0
    """Dropout of embeddings, attention and residuals."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products."""
    remat: Remat = "dots"
    """What the backward pass computes again: none, dots (all but matrix products), full."""
    init_std: float = 0.02
    """Deviation of the initial weights."""

    def build(self, vocab_size: int, length: int) -> TransformerConfig:
        """The transformer's config."""
        config = gpt2(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads,
            vocab_size=vocab_size,
            max_length=length,
            dropout=self.dropout,
        )
        return dataclasses.replace(
            config, dtype=self.dtype, remat=self.remat, init_std=self.init_std
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the run does; every field is an option of the command line."""

    corpus: tuple[str, ...] = ("stdlib",)
    """Sources, each [WEIGHT*]KIND: stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field, hf:NAME_OR_FOLDER#field."""
    on_error: Literal["raise", "skip"] | None = None
    """What a document that cannot be used (unreadable, empty, not UTF-8) is: an error, or a counted skip; None leaves it to
    the source, which raises except for the standard library's."""
    vocab_size: int = 2048
    """Size of the byte-level BPE that is trained on the corpus."""
    tokenizer: pathlib.Path | None = None
    """A tokenizer.json, or its folder, to use instead of training one."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out."""
    length: int = 256
    """Tokens in a row, and positions of the model."""
    batch_size: int = 16
    """Rows in a batch, over all devices."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into, to save memory."""
    steps: int = 240
    """Batches to train on. A technique makes more and smaller ones of them, with as many tokens, averaged over the layers."""
    technique: Technique = "none"
    """Curriculum learning (cl: rows of frequent tokens and short rows first), random-LTD (ltd: middle layers see some of
    the tokens) or both."""
    efficiency: DataEfficiencyConfig = DataEfficiencyConfig()
    """The schedules of the technique."""
    model: ModelConfig = ModelConfig()
    """The model."""
    learning_rate: float = 3e-3
    """Peak of the schedule: a linear warmup by steps, then a cosine by tokens."""
    final_learning_rate: float | None = None
    """End of the schedule; None takes a tenth of the peak."""
    warmup: int = 30
    """Steps of warmup, whatever a technique makes of their batches."""
    optimizer: AdamWConfig = AdamWConfig()
    """AdamW."""
    clip_norm: float = 1.0
    """Greatest norm of the gradient."""
    mesh: MeshConfig = MeshConfig()
    """How devices are laid out; -1 means the rest."""
    eval_every: int = 60
    """Steps between evaluations on a part of the held-out text, whose loss is part_val_loss; at the end, val_loss is that on all of it."""
    eval_batches: int = 6
    """Batches in that part."""
    checkpoint_every: int = 60
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints to keep."""
    samples: tuple[str, ...] = ("def read", "import ", "The ", "class Test")
    """Prompts that the trained model continues."""
    sample_tokens: int = 80
    """Tokens of each continuation."""
    seed: int = 0
    """Decides the split, the order of data, the initial weights and the samples."""
    out: pathlib.Path | None = None
    """Folder of the run; by default runs/quickstart/<time>."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint, exactly as if it had not stopped."""
    cache: pathlib.Path | None = None
    """Where prepared corpora are kept; by default the user's cache folder."""

    def __post_init__(self):
        check_finite(self)
        check(self, len(self.corpus) >= 1, "corpus", "at least one source")
        check(self, 0 < self.validation_fraction < 1, "validation_fraction", "between 0 and 1")
        check(self, self.clip_norm > 0, "clip_norm", "above 0")
        check(self, is_integer(self.seed) and self.seed >= 0, "seed", "an integer, 0 or above")
        for name in (
            "length",
            "batch_size",
            "accumulate",
            "steps",
            "eval_every",
            "eval_batches",
            "checkpoint_every",
            "keep",
            "sample_tokens",
        ):
            check(self, getattr(self, name) >= 1, name, "at least 1")
        check(
            self,
            self.batch_size % self.accumulate == 0,
            "accumulate",
            f"a divisor of batch_size={self.batch_size}",
        )
        # An impossible model or technique is refused here.
        model = self.model.build(self.vocab_size, self.length)
        check_technique(
            self.technique, self.efficiency, model, steps=self.steps, length=self.length
        )
        if self.technique in CURRICULA:
            wanted = "one source, whose rows a curriculum orders"
            check(self, len(self.corpus) == 1, "corpus", wanted)
        check(self, 0 <= self.warmup < self.steps, "warmup", f"from 0 to below steps={self.steps}")
        check(self, 0 < self.learning_rate < float("inf"), "learning_rate", "above 0, and finite")
        final = self.final_learning_rate
        check(
            self,
            final is None or 0 <= final <= self.learning_rate,
            "final_learning_rate",
            f"from 0 to learning_rate={self.learning_rate}, or None",
        )
        check(
            self,
            not (self.resume and self.out is None),
            "resume",
            "given with --out, the folder to go on with",
        )

    def schedule(self) -> optax.GradientTransformationExtraArgs:
        """The learning rate, the optimizer's last link: it warms up by steps and decays by layer-averaged tokens.

        Its numbers are a part of the optimizer's state, so that one compiled step serves all of them.
        """
        from effscale.curriculum import steps_then_tokens

        final = self.final_learning_rate
        return optax.inject_hyperparams(steps_then_tokens, static_args="kind")(
            peak=self.learning_rate,
            warmup_steps=self.warmup,
            total_tokens=float(self.steps * self.batch_size * self.length),
            final=self.learning_rate / 10 if final is None else final,
        )

    def plan(self, vocab_size: int) -> Plan:
        """The shapes of the run and its number of steps."""
        return make_plan(
            self.technique,
            self.efficiency,
            self.model.build(vocab_size, self.length),
            steps=self.steps,
            batch_size=self.batch_size,
            length=self.length,
        )


PRESETS = {
    "smoke": Config(
        steps=24,
        warmup=4,
        batch_size=4,
        length=64,
        vocab_size=512,
        model=ModelConfig(num_layers=2, d_model=64, num_heads=2),
        eval_every=12,
        eval_batches=2,
        checkpoint_every=12,
        sample_tokens=16,
    ),
    "default": Config(),
    # Radford et al., 2019: 124M parameters, 1024 positions, batches of 512 rows.
    "paper": Config(
        vocab_size=50257,
        length=1024,
        batch_size=512,
        accumulate=4,
        steps=600_000,
        warmup=2000,
        learning_rate=6e-4,
        model=ModelConfig(num_layers=12, d_model=768, num_heads=12, dtype="bfloat16", remat="full"),
        eval_every=1000,
        eval_batches=20,
        checkpoint_every=1000,
    ),
}

FREE = (
    "out",
    "resume",
    "cache",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
    "keep",
    "samples",
    "sample_tokens",
    "mesh",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The named figures of a run, as in its ``results.json``."""

    val_loss: float
    """Mean loss on all held-out tokens, in nats a token."""
    unigram_entropy: float
    """Entropy of the held-out tokens' frequencies: the least loss without context, in nats a token."""
    train_loss: float
    """Mean training loss of the last 20 steps, in nats a token."""
    tokens_seen: int
    """Training tokens, repetitions included; with a technique, those that a layer processed on average."""
    tokens_per_second: float
    """Median training speed, in these tokens; 0 if there were too few steps to tell."""
    num_params: int
    """Numbers in the model."""
    num_compilations: int
    """Compilations of the training step."""
    seconds: float
    """Time of this call, from the corpus to the figures."""
    peak_memory_mb: float
    """Greatest resident memory of the process."""
    folder: str
    """The run folder."""


def run(config: Config) -> Result:
    """Trains as ``config`` says and fills the run folder.

    Args:
        config: What to do.

    Returns:
        The named figures.

    Raises:
        ValueError: If parts of the config do not fit each other or the corpus.
        FileExistsError: If ``out`` already holds a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
    """
    # Importing what only a run needs here keeps --help quick.
    from effscale.data import save_tokenizer, unigram_entropy
    from effscale.experiments.plotting import loss_curve, speed_curve
    from effscale.experiments.pretraining import Pretraining
    from effscale.training import RunFolder, read_jsonl

    began = time.perf_counter()
    first = jax.process_index() == 0  # of several processes, the one that writes
    mesh = config.mesh.build()
    part = batch_shard(mesh)
    # What cannot work is refused before the corpus is prepared.
    shard_batch(np.zeros(config.batch_size // part.count, np.int8), mesh)
    check_folder(config, FREE)

    # Corpus: a tokenizer, and token stores for training and validation.
    corpora, weights = prepared_corpora(
        config, tokenizer=config.tokenizer, seed=config.seed, on_error=config.on_error
    )
    tokenizer = corpora[0].tokenizer
    held_out = [c.validation for c in corpora]

    # Model, optimizer, step and batches, as the technique has them.
    training = Pretraining(config, corpora[0].vocab_size, mesh)
    train_data = training.batches([c.train for c in corpora], seed=config.seed, weights=weights)
    val_data = training.held_out(held_out)

    def validate(state: Any) -> dict[str, float]:
        means = training.validate(state, val_data, config.eval_batches)
        return {"part_val_loss": means["val_loss"], "val_tokens_seen": means["val_tokens_seen"]}

    # The run: from the start, or from the last checkpoint.
    folder = RunFolder.create(
        config.out,
        name="quickstart",
        config=config,
        data=corpus_digests(corpora),
        resume=config.resume,
    )
    with resumable(folder), jax.set_mesh(mesh):
        if first:
            save_tokenizer(tokenizer, folder.path)
        trained = training.train(
            train_data,
            folder.path,
            config=config,
            evaluate=validate,
            tensorboard=folder.tensorboard,
            free_fields=FREE,
        )
        state = trained.state
        if trained.stopped_reason == "signal":
            raise StoppedBySignal(f"stopped and saved at step {int(state.step)}", trained.signal)

        # What came out.
        num_params = sum(leaf.size for leaf in jax.tree.leaves(state.model))
        with status("evaluating on all that is held out"):
            val_loss = training.validate(state, val_data)["val_loss"]
        with status("sampling"):
            texts = sample(state.model, tokenizer, config)
    records = read_jsonl(folder.metrics_file)
    timing = read_jsonl(folder.metrics_file.with_name("timing.jsonl"))
    entropy = unigram_entropy(held_out)
    losses = [r["loss"] for r in records if r.get("loss") is not None]
    speeds = sorted(r["tokens_per_second"] for r in timing)
    result = Result(
        val_loss=val_loss,
        unigram_entropy=entropy,
        train_loss=sum(losses[-20:]) / len(losses[-20:]),
        tokens_seen=int(state.tokens),
        tokens_per_second=speeds[len(speeds) // 2] if speeds else 0.0,
        num_params=num_params,
        num_compilations=len(trained.compilations),
        seconds=time.perf_counter() - began,
        peak_memory_mb=peak_memory(),
        folder=str(folder.path),
    )
    if first:
        loss_curve(
            folder.figures / "loss.png",
            records,
            title=f"A GPT of {num_params / 1e6:.1f}M parameters on {', '.join(config.corpus)}",
            levels={"unigram entropy": entropy},
        )
        speed_curve(folder.figures / "speed.png", timing, title="Training speed")
        folder.write_results(dataclasses.asdict(result))
        quoted = "\n\n".join("```text\n" + text.replace("```", "'''") + "\n```" for text in texts)
        folder.write_report(
            "quickstart", dataclasses.asdict(result), f"Samples of the trained model:\n\n{quoted}"
        )
        show_results("quickstart", result, texts)
    folder.close()
    return result


def sample(model: Transformer, tokenizer: Any, config: Config) -> list[str]:
    """Continuations of the prompts in ``config.samples``, drawn at temperature 0.8 from the likeliest 95 percent."""
    from jax.experimental import multihost_utils

    from effscale.generation import SamplingConfig, generate, left_pad

    if not config.samples:
        return []
    room = model.config.max_length
    prompts = [tokenizer.encode(text).ids[: room // 2] for text in config.samples]
    tokens, mask = left_pad(prompts)
    new = min(config.sample_tokens, room - tokens.shape[1])
    settings = SamplingConfig(max_new_tokens=new, temperature=0.8, top_p=0.95)
    out = generate(model, tokens, settings, attention_mask=mask, key=jax.random.key(config.seed))
    rows = multihost_utils.process_allgather((out.tokens, out.mask), tiled=True)
    return [tokenizer.decode(row[keep].tolist()) for row, keep in zip(*rows, strict=True)]


def load(folder: str | os.PathLike[str], *, step: int | None = None) -> tuple[Transformer, Any]:
    """The model of a run folder, with its tokenizer; the run may still be going on.

    Args:
        folder: A run folder of this experiment.
        step: The checkpoint; None takes the newest sound one.

    Returns:
        The model and the ``tokenizers.Tokenizer``.

    Raises:
        FileNotFoundError: If there is no checkpoint, or none of that step.
        CheckpointError: If there are checkpoints, and all are damaged.
        ValueError: If the run is of another experiment.
    """
    from effscale.data import load_tokenizer
    from effscale.training import read_checkpoint_config, restore_model

    config = config_from_json(Config, read_checkpoint_config(folder, step))
    tokenizer = load_tokenizer(folder)
    wanted = abstract(config.model.build(tokenizer.get_vocab_size(), config.length))
    model, _ = restore_model(folder, wanted, step=step)
    return model, tokenizer


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    with messages():
        config = parse(
            PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.quickstart"
        )
        if initialize():
            # Until training installs its own handler, JAX's would swallow the signal.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()
