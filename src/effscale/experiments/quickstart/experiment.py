"""Train a small GPT on real text, end to end.

Tokenizer, packed data, training with checkpoints, evaluation, figures and generation: every part of the library
except the techniques, in one script that you can read from top to bottom. The default corpus is the standard library
of the running Python, so nothing is downloaded. ``--technique`` trains with curriculum learning, random-LTD or both;
the experiment ``data_efficiency`` compares them.

    python -m effscale.experiments.quickstart
    python -m effscale.experiments.quickstart --corpus 'text:books/*.txt' --steps 2000
    python -m effscale.experiments.quickstart --technique cl_ltd
    python -m effscale.experiments.quickstart --out runs/mine --resume

To load the model of a finished or running run folder: ``model, tokenizer = load("runs/mine")``.
"""

import dataclasses
import os
import signal
import time
from typing import Any

import jax
import numpy as np

from effscale.experiments.quickstart.config import FREE, PRESETS, Config
from effscale.experiments.shared.prepared import corpus_digests, prepared_corpora
from effscale.models import Transformer, abstract
from effscale.parallel import batch_shard, initialize, on_first, shard_batch
from effscale.study.command import StoppedBySignal, messages, parse
from effscale.study.console import show_results, status
from effscale.study.folder import check_folder, open_folder, resumable
from effscale.study.host import keep_freed_memory, peak_memory
from effscale.training.saved import config_from_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The figures of a run, as in its ``results.json``."""

    val_loss: float
    """Mean loss on all held-out tokens, in nats per token."""
    unigram_entropy: float
    """Entropy of the token frequencies in the held-out text: the lowest possible loss without context, in nats per token."""
    train_loss: float
    """Mean training loss of the last 20 steps, in nats per token."""
    tokens_seen: int
    """Number of training tokens, including repetitions; with a technique, those that a layer processed on average."""
    tokens_per_second: float
    """Median training speed, counted in the same tokens; 0 if there were too few steps to measure it."""
    num_params: int
    """Number of parameters of the model."""
    num_compilations: int
    """Number of compilations of the training step."""
    seconds: float
    """Duration of this call, from the corpus to the figures."""
    peak_memory_mb: float
    """Peak resident memory of the process."""
    folder: str
    """The run folder."""


def run(config: Config) -> Result:
    """Train according to ``config`` and fill the run folder.

    Args:
        config: Options of the run.

    Returns:
        The named figures.

    Raises:
        ValueError: The config is inconsistent or does not match the corpus.
        FileExistsError: ``out`` already contains a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
    """
    # Imports that only a run needs are here, so that --help is fast.
    from effscale.data import save_tokenizer, unigram_entropy
    from effscale.experiments.shared.pretraining import Pretraining
    from effscale.training import read_jsonl
    from effscale.training.plotting import loss_curve, speed_curve

    began = time.perf_counter()
    first = jax.process_index() == 0  # only the first of several processes writes
    mesh = config.mesh.build()
    part = batch_shard(mesh)
    # Invalid settings raise before the corpus is prepared.
    shard_batch(np.zeros(config.batch_size // part.count, np.int8), mesh)
    check_folder(config, FREE)

    # Corpus: a tokenizer, and token stores for training and validation.
    corpora, weights = prepared_corpora(
        config, tokenizer=config.tokenizer, seed=config.seed, on_error=config.on_error
    )
    tokenizer = corpora[0].tokenizer
    held_out = [c.validation for c in corpora]

    # Model, optimizer, step and batches for the technique.
    training = Pretraining(config, corpora[0].vocab_size, mesh)
    train_data = training.batches([c.train for c in corpora], seed=config.seed, weights=weights)
    val_data = training.held_out(held_out)

    def validate(state: Any) -> dict[str, float]:
        means = training.validate(state, val_data, config.eval_batches)
        return {"part_val_loss": means["val_loss"], "val_tokens_seen": means["val_tokens_seen"]}

    # The run: from the start, or from the last checkpoint.
    folder = open_folder(config, "quickstart", corpus_digests(corpora))
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

        # Evaluation and results.
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
    on_first(folder.close)  # the other processes wait for the last copy
    return result


def sample(model: Transformer, tokenizer: Any, config: Config) -> list[str]:
    """Return continuations of the prompts in ``config.samples``, sampled at temperature 0.8 from the most likely 95 percent."""
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
    from effscale.training import read_checkpoint_config, restore_model

    config = config_from_json(Config, read_checkpoint_config(folder, step))
    tokenizer = read_tokenizer(folder)
    wanted = abstract(config.model.build(tokenizer.get_vocab_size(), config.length))
    model, _ = restore_model(folder, wanted, step=step)
    return model, tokenizer


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    with messages():
        config = parse(
            PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.quickstart"
        )
        if initialize():
            # Until training installs its own handler, JAX's handler would swallow the signal.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()
