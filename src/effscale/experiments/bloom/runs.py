"""The runs of each seed: pretraining, and fine-tuning on prompted tasks. Each writes a model folder, which is evaluated separately."""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import grain
import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from effscale.data import batch_rows, make_dataset, packed_rows
from effscale.experiments.bloom.config import Config
from effscale.experiments.bloom.corpus import Prepared
from effscale.experiments.bloom.messages import Split
from effscale.experiments.bloom.tasks import Accuracy, Tasks, evaluate_tasks
from effscale.experiments.shared.runs import once, train_to_end
from effscale.interop import load_pretrained, save_pretrained
from effscale.models import Transformer, with_config
from effscale.parallel import batch_shard, shard_batch, shardings
from effscale.parallel.peers import on_first
from effscale.rlhf.data import RecordEncoder, fine_tuning_rows
from effscale.training import (
    AdamWConfig,
    Clip,
    KeepBest,
    RunFolder,
    StagedStep,
    TrainState,
    create_train_state,
    evaluate,
    make_eval_step,
    make_train_step,
    next_token_loss,
    resize_rows,
)
from effscale.training.serialize import write_json

_EVAL_STEP = jax.jit(make_eval_step(next_token_loss))


class Runs:
    """The runs of all seeds, which share compiled programs.

    Args:
        config: Config of the experiment.
        folder: The run folder.
        mesh: The device mesh.
        prepared: The prepared corpus.
        tasks: The tasks.

    Raises:
        ValueError: The tasks yield too few rows for a batch.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        mesh: jax.sharding.Mesh,
        prepared: Prepared,
        tasks: Tasks,
    ):
        self.config, self.folder, self.mesh = config, folder, mesh
        self.prepared, self.tasks = prepared, tasks
        self._part = batch_shard(mesh)
        self._place = functools.partial(shard_batch, mesh=mesh)
        self._model = config.model.build(prepared.tokenizer.get_vocab_size())
        how = config.pretrain
        adam = AdamWConfig(b2=config.b2, weight_decay=config.weight_decay)
        self._optimizer = adam.build(how.schedule(config.length).build())
        self._step = make_train_step(
            next_token_loss,
            self._optimizer,
            accumulate=how.accumulate,
            clip=Clip(config.clip_norm),
        )
        self._staged = self._stage()

    def run(self, seed: int) -> None:
        """Start both runs of a seed, resume one that was stopped, or skip finished ones.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """
        steps = {
            "pretrain": self._pretrain,
            "zero_shot_before": functools.partial(self._evaluate, model="pretrain"),
            "finetune": self._finetune,
            "zero_shot_after": functools.partial(self._evaluate, model="finetune"),
        }
        for name, step in steps.items():
            once(self.folder, f"seed-{seed}/{name}", functools.partial(step, seed))

    def close(self) -> None:
        """Stop the compilation thread."""
        self._staged.close()

    def place(self, seed: int, name: str) -> pathlib.Path:
        """Return the folder of a run."""
        return self.folder.path / f"seed-{seed}" / name

    def task_rows(self, seed: int) -> dict[str, np.ndarray]:
        """Return the packed rows of fine-tuning.

        Raises:
            ValueError: There are fewer rows than a batch needs.
        """
        batch = self.config.finetune.batch_size
        encoder = RecordEncoder(
            tokenizer=self.prepared.tokenizer, eos_token_id=self.prepared.end_id
        )
        rows = fine_tuning_rows(
            self.tasks.records(seed), encoder, length=self.config.length, weigh="record"
        )
        count = len(rows["input_ids"])
        if count < batch:
            raise ValueError(
                f"finetune.batch_size must be at most the {count} packed rows of length={self.config.length} that the tasks yield, got {batch}"
            )
        return rows

    def _stage(self) -> StagedStep:
        # Each process shapes its part of a batch.
        sizes = self.config.pretrain.ramp().map(lambda size: size // self._part.count)
        return StagedStep(self._step, sizes, resize_rows, place_batch=self._place)

    def _pretrain(self, seed: int) -> None:
        config, how = self.config, self.config.pretrain

        def create() -> TrainState:
            fresh = Transformer(self._model, rngs=nnx.Rngs(seed))
            return create_train_state(fresh, self._optimizer, key=jax.random.key(seed))

        stores = [corpus.train for corpus in self.prepared.corpora.values()]
        weights = [self.prepared.weights[name] for name in self.prepared.corpora]
        # As in BLOOM: documents follow each other in a row, and attention crosses their boundaries.
        rows = packed_rows(
            stores, length=config.length, seed=seed, weights=weights, cross_document=True
        )
        state = train_to_end(
            self.folder,
            f"seed-{seed}/pretrain",
            self._staged,
            self._batches(rows, how.ramp()),
            create=create,
            num_steps=how.steps,
            evaluate=lambda state: {"val_loss": self._validate(state.model)["all"]},
            every=config.checkpoint_every,
            restage=self._stage,
            compile_first=False,
            layout=shardings(jax.eval_shape(create), self.mesh),
            place_batch=self._place,
        )
        self._save(seed, "pretrain", state.model)

    def _finetune(self, seed: int) -> None:
        config, how = self.config, self.config.finetune
        packed = self.task_rows(seed)
        rows = grain.MapDataset.range(len(packed["input_ids"])).map(
            lambda i: {name: array[i] for name, array in packed.items()}
        )
        rows = rows.shuffle(seed=seed).repeat(None)
        optimizer = AdamWConfig(b2=config.b2, weight_decay=how.weight_decay).build(
            how.learning_rate
        )
        step = make_train_step(
            next_token_loss, optimizer, accumulate=how.accumulate, clip=Clip(config.clip_norm)
        )
        best = KeepBest(self.place(seed, "finetune") / "best")

        def create() -> TrainState:
            return create_train_state(
                self._load(seed, "pretrain"), optimizer, key=jax.random.key(seed)
            )

        def select(state: TrainState) -> Mapping[str, float]:
            found = self._judge(state.model, "validation", config.selection_examples)
            value = float(np.mean([each.median for each in found if each.cell.group != "learned"]))
            best.offer(int(state.step), state.model, value)
            return {"validation_accuracy": value}

        state = train_to_end(
            self.folder,
            f"seed-{seed}/finetune",
            jax.jit(step, donate_argnums=0),
            self._batches(rows, how.batch_size),
            create=create,
            trace_create=False,  # weights from a file are not part of a program
            num_steps=how.steps,
            evaluate=select,
            every=how.eval_every,
            place_batch=self._place,
        )
        chosen = best.restore(state.model)
        self._save(seed, "finetune", chosen.model)

        def finish() -> None:
            write_json(
                self.place(seed, "finetune") / "chosen.json",
                {"step": chosen.step, "validation_accuracy": chosen.value},
            )
            shutil.rmtree(self.place(seed, "finetune") / "best")

        on_first(finish)

    def _evaluate(self, seed: int, model: str) -> None:
        """Evaluate losses and accuracies of the model that a run saved."""
        name = {"pretrain": "zero_shot_before", "finetune": "zero_shot_after"}[model]
        loaded = self._load(seed, model)
        accuracies = self._judge(loaded, "test", self.config.eval_examples)
        found = {
            "val_loss": self._validate(loaded),
            "accuracy": [_plain(each) for each in accuracies],
        }

        def write() -> None:
            self.place(seed, name).mkdir(parents=True, exist_ok=True)
            write_json(self.place(seed, name) / "found.json", found)

        on_first(write)

    def _batches(self, rows: grain.MapDataset, sizes: Any) -> Any:
        part = self._part
        options = {"process_index": part.index, "process_count": part.count}
        return iter(batch_rows(rows, batch_size=sizes, **options))

    def _validate(self, model: Transformer) -> dict[str, float]:
        """Return the loss on the first held-out rows of each component, in nats per token, and as ``all`` their mean with the mixture's
        weights.
        """
        config, losses = self.config, {}
        for name, corpus in self.prepared.corpora.items():
            batches = make_dataset(
                corpus.validation,
                batch_size=config.pretrain.batch_size,
                length=config.length,
                shuffle=False,
                num_epochs=1,
                remainder="pad",
                cross_document=True,
                process_index=self._part.index,
                process_count=self._part.count,
            )
            first = (batch for batch, _ in zip(batches, range(config.eval_batches), strict=False))
            losses[name] = evaluate(model, _EVAL_STEP, first, place_batch=self._place)["loss"]
        weights = self.prepared.weights
        return losses | {"all": sum(weights[name] * loss for name, loss in losses.items())}

    def _judge(self, model: Transformer, split: Split, count: int) -> list[Accuracy]:
        if jax.process_count() > 1:
            # Every process evaluates a whole copy, with the same result.
            model = multihost_utils.process_allgather(model, tiled=True)
        options = {"split": split, "count": count, "batch_size": self.config.eval_batch}
        return evaluate_tasks(self.tasks, model, self.prepared.tokenizer, **options)

    def _load(self, seed: int, name: str) -> Transformer:
        """Load the model of a run, with parameters in float32 and the same compute dtype as in the run."""
        model = load_pretrained(self.place(seed, name) / "model", dtype="float32", mesh=self.mesh)
        how = self.config.model
        return with_config(
            model, dataclasses.replace(model.config, dtype=how.dtype, remat=how.remat)
        )

    def _save(self, seed: int, name: str, model: Transformer) -> None:
        save_pretrained(model, self.place(seed, name) / "model", tokenizer=self.prepared.tokenizer)


def _plain(found: Accuracy) -> dict[str, Any]:
    cell = dataclasses.asdict(found.cell)
    templates = {"templates": dict(found.of_template), "median": found.median}
    return {**cell, **templates, "chance": found.chance}
