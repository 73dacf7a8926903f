"""Train a small GPT on real text, end to end.

Tokenizer, packed data, training with checkpoints, evaluation, figures and generation: every part of the library
except the techniques, in one script that you can read from top to bottom. The default corpus is the standard library
of the running Python, so nothing is downloaded.

    python -m effscale.experiments.quickstart
    python -m effscale.experiments.quickstart --corpus 'text:books/*.txt' --steps 2000
    python -m effscale.experiments.quickstart --out runs/mine --resume

To load the model of a finished or running run folder: ``model, tokenizer = load("runs/mine")``.
"""

import dataclasses
import os
import pathlib
import signal
import time
from typing import Any, Literal

import jax
import numpy as np

from effscale.command.folder import OUTPUT, Result, check_folder, finish, open_folder, resumable
from effscale.command.line import keep_freed_memory, messages, parse
from effscale.experiments.shared.config_parts import CorporaPart
from effscale.experiments.shared.gpt import ModelConfig
from effscale.experiments.shared.prepared import Text, prepared_corpora
from effscale.models import Transformer
from effscale.models.presets import abstract_model
from effscale.options import NonNegativeInt, PositiveFloat, PositiveInt, check
from effscale.parallel import MeshConfig, batch_shard, initialize, shard_batch
from effscale.parallel.peers import on_first
from effscale.run import Run, Trained
from effscale.training import Clip, RunFolder, ScheduleConfig, read_jsonl, restore_model
from effscale.training.saved import config_from_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(CorporaPart):
    """Options of the run; every field is a command-line option."""

    steps: PositiveInt = 240
    """Optimizer steps."""
    length: PositiveInt = 256
    """Sequence length: tokens per row, and positions of the model."""
    batch_size: PositiveInt = 16
    """Rows per batch, over all devices."""
    accumulate: PositiveInt = 1
    """Number of micro-batches that a batch is split into, to save memory."""
    model: ModelConfig = ModelConfig()
    """The model."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate: a linear warmup, then a cosine to a tenth."""
    warmup: NonNegativeInt = 30
    """Warmup steps."""
    vocab_size: PositiveInt = 2048
    """Vocabulary size of the byte-level BPE that is trained on the corpus."""
    on_error: Literal["raise", "skip"] | None = None
    """What to do with a document that cannot be used (unreadable, empty, not UTF-8): raise, or skip and count it.
    None uses the default of the source: skip for the standard library, raise for all others."""
    eval_every: PositiveInt = 60
    """Steps between evaluations on part of the held-out text, and between checkpoints; the last evaluation is on all of it."""
    eval_batches: PositiveInt = 6
    """Number of batches in that part."""
    samples: tuple[str, ...] = ("def read", "import ", "The ", "class Test")
    """Prompts for the trained model to continue."""
    seed: NonNegativeInt = 0
    """Seed of the split, the order of data, the initial weights and the samples."""
    mesh: MeshConfig = MeshConfig()
    """Device mesh: the size of each axis; -1 means all remaining devices."""

    def __post_init__(self):
        super().__post_init__()
        divisor = f"a divisor of batch_size={self.batch_size}"
        check(self, self.batch_size % self.accumulate == 0, "accumulate", divisor)
        check(self, self.warmup < self.steps, "warmup", f"from 0 to below steps={self.steps}")
        self.model.build(self.vocab_size, self.length)  # raises for an invalid model


PRESETS = {
    "smoke": Config(
        steps=24,
        length=64,
        batch_size=4,
        model=ModelConfig(num_layers=2, d_model=64, num_heads=2),
        warmup=4,
        vocab_size=512,
        eval_every=12,
        eval_batches=2,
    ),
    "default": Config(),
    # Radford et al., 2019: 124M parameters, 1024 positions, batches of 512 rows.
    "paper": Config(
        steps=600_000,
        length=1024,
        batch_size=512,
        accumulate=4,
        model=ModelConfig(num_layers=12, d_model=768, num_heads=12, dtype="bfloat16", remat="full"),
        learning_rate=6e-4,
        warmup=2000,
        vocab_size=50257,
        eval_every=1000,
        eval_batches=20,
    ),
}

FREE = (*OUTPUT, "cache", "eval_every", "eval_batches", "mesh", "samples")
"""Fields that can change when the run is resumed."""


def run(config: Config, text: Text | None = None) -> Run:
    """Return the run; without a text only to be lowered."""
    peak = config.learning_rate
    rate = ScheduleConfig(peak=peak, warmup=config.warmup, total=config.steps, final=peak / 10)
    vocab_size = config.vocab_size if text is None else text.vocab_size
    described = Run(
        model=config.model.build(vocab_size, config.length),
        learning_rate=rate.build(),
        clip=Clip(1.0),
        accumulate=config.accumulate,
        num_steps=config.steps,
        checkpoint_every=config.eval_every,
        keep=3,
        mesh=config.mesh,
    )
    return described if text is None else text.next_token_run(described, config)


def train(config: Config) -> Result:
    """Train according to ``config`` and fill the run folder.

    Raises:
        ValueError: The config is inconsistent or does not match the corpus.
        FileExistsError: ``out`` already contains a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
    """
    from effscale.data.tokenizer import save_tokenizer

    began = time.perf_counter()
    mesh = config.mesh.build()
    # What is invalid raises before the corpus is prepared: rows that the devices cannot share, and the folder.
    shard_batch(np.zeros(config.batch_size // batch_shard(mesh).count, np.int8), mesh)
    check_folder(config, FREE)
    text = Text(*prepared_corpora(config, seed=config.seed, on_error=config.on_error))
    described = run(config, text)
    folder = open_folder(config, "quickstart", text.digests())
    with resumable(folder):
        on_first(lambda: save_tokenizer(text.tokenizer, folder.path))
        trained = described.fit_in(folder.path, seed=config.seed, tensorboard=folder.tensorboard)
        with jax.set_mesh(mesh):
            written = sample(trained.model, text.tokenizer, config)
        figures = on_first(lambda: measured(trained, text, folder)) or {}
        if jax.process_index() == 0:
            print(*written, sep=f"\n{80 * '-'}\n")
        quoted = ["```text\n" + each.replace("```", "'''") + "\n```" for each in written]
        return finish(folder, "quickstart", figures, {}, began=began, text="\n\n".join(quoted))


def measured(trained: Trained, text: Text, folder: RunFolder) -> dict[str, float]:
    """Draw the curves, and return the named figures."""
    from effscale.data import unigram_entropy
    from effscale.training.plotting import loss_curve, speed_curve

    records = read_jsonl(folder.metrics_file)
    timing = read_jsonl(folder.metrics_file.with_name("timing.jsonl"))
    entropy = unigram_entropy(text.validation)
    loss_curve(folder.figures / "loss.png", records, levels={"unigram entropy": entropy})
    speed_curve(folder.figures / "speed.png", timing, title="Training speed")
    losses = [record["loss"] for record in records if "loss" in record]
    speeds = [record["tokens_per_second"] for record in timing]
    return {
        "val_loss": trained.metrics["val_loss"],
        "unigram_entropy": entropy,
        "train_loss": float(np.mean(losses[-20:])),
        "tokens_seen": int(trained.state.tokens),
        "tokens_per_second": float(np.median(speeds)) if speeds else 0.0,
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(trained.model)),
        "num_compilations": len(trained.compilations),
    }


def sample(model: Transformer, tokenizer: Any, config: Config) -> list[str]:
    """Return continuations of the prompts in ``config.samples``, sampled at temperature 0.8 from the most likely 95 percent."""
    from jax.experimental import multihost_utils

    from effscale.generation import SamplingConfig, generate, left_pad

    if not config.samples:
        return []
    prompts = [tokenizer.encode(text).ids[: config.length // 2] for text in config.samples]
    tokens, mask = left_pad(prompts)
    new = min(80, config.length - tokens.shape[1])
    settings = SamplingConfig(max_new_tokens=new, temperature=0.8, top_p=0.95)
    out = generate(model, tokens, settings, attention_mask=mask, key=jax.random.key(config.seed))
    rows = multihost_utils.process_allgather((out.tokens, out.mask), tiled=True)
    return [tokenizer.decode(row[keep].tolist()) for row, keep in zip(*rows, strict=True)]


def load(folder: str | os.PathLike[str], *, step: int | None = None) -> tuple[Transformer, Any]:
    """Load the model of a run folder, with its tokenizer; the run may still be in progress.

    Args:
        folder: A run folder of this experiment.
        step: Step of the checkpoint; None uses the newest valid one.

    Returns:
        The model and the ``tokenizers.Tokenizer``.

    Raises:
        FileNotFoundError: There is no checkpoint, or no checkpoint of that step.
        CheckpointError: There are checkpoints, but all are damaged.
        ValueError: The run belongs to another experiment.
    """
    from effscale.data import read_tokenizer

    config = config_from_json(Config, RunFolder(pathlib.Path(folder)).config())
    tokenizer = read_tokenizer(folder)
    wanted = abstract_model(config.model.build(tokenizer.get_vocab_size(), config.length))
    return restore_model(folder, wanted, step=step)[0], tokenizer


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    with messages():
        name = "python -m effscale.experiments.quickstart"
        config = parse(PRESETS, __doc__ or "", argv, name=name)
        if initialize():
            # Until training installs its own handler, JAX's handler would swallow the signal.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        keep_freed_memory()
        train(config)


if __name__ == "__main__":
    main()
