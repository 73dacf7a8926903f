"""A training run as one object: what is trained, on what, how, and for how long."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from effscale.models import Transformer, TransformerConfig
from effscale.moe import RouterWatch
from effscale.optim import Workers
from effscale.options import Options, PositiveInt, check
from effscale.parallel import (
    MeshConfig,
    per_worker,
    shard_batch,
    shardings,
    simulate_workers,
)
from effscale.parallel.machines import machine
from effscale.parallel.placement import lower_step
from effscale.parallel.program_cost import ProgramCost, matmul_operations, program_cost
from effscale.training import (
    AdamWConfig,
    Checkpoints,
    Clip,
    ConsoleWriter,
    Evaluation,
    JsonlWriter,
    MultiWriter,
    RunFolder,
    ScheduleConfig,
    ShapeBuckets,
    StagedStep,
    TensorBoardWriter,
    TrainState,
    create_train_state,
    fit,
    make_train_step,
    next_token_loss,
    read_jsonl,
    resume_or_start,
)
from effscale.training.buckets import Compilation
from effscale.training.errors import StoppedBySignal
from effscale.training.schedules import Schedule
from effscale.training.serialize import to_json
from effscale.training.staged import Changes
from effscale.training.step import LossFunction, count_tokens

__all__ = ["Run"]


class Trained(NamedTuple):
    """What a run leaves.

    Attributes:
        state: The final state; ``state.model`` is the model.
        metrics: The last value of each metric.
        history: All records of ``metrics.jsonl`` of this call.
        compilations: The compilations of the training step.
    """

    state: TrainState
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    compilations: list[Compilation]

    @property
    def model(self) -> Any:
        """The trained model."""
        return self.state.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Options):
    """A training run: what is trained, on what, how, and for how long.

    A run describes one program. ``fit`` trains it, ``lower`` compiles it for other devices, present or not, and a
    ``effscale.study.Study`` compares several. The seed is not part of it: runs with different seeds share the compiled
    program. ``dataclasses.replace`` makes a variant.

    Example:
        A user's own model, loss and batches:

        >>> import tempfile
        >>> import jax.numpy as jnp, numpy as np, optax
        >>> from effscale.run import Run
        >>> from effscale.training import Loss
        >>> def squares(params, batch, key):
        ...     error = (batch["x"] @ params["w"] - batch["y"]) ** 2
        ...     return Loss(error.sum(), jnp.float32(error.size))
        >>> x = np.eye(4, dtype=np.float32)
        >>> run = Run(model={"w": jnp.zeros(4)}, data=[{"x": x, "y": x[0]}] * 50, loss=squares,
        ...     optimizer=optax.adam(0.1), num_steps=50)
        >>> trained = run.fit(tempfile.mkdtemp() + "/run", quiet=True)
        >>> trained.metrics["loss"] < 0.01
        True
    """

    model: Any
    """The model before the first step: a ``TransformerConfig`` (initialized with the seed), a function of a key, the folder of a
    pretrained model, or any pytree, such as an NNX module or the params of a Linen module."""
    data: Any = None
    """The batches, as trees of NumPy arrays: an iterable, or a function of the seed that returns one. If its iterator has ``get_state`` and
    ``set_state``, as grain's have, a resumed run continues there; otherwise it reads and discards the batches that it has seen. None is only for
    ``lower``."""
    num_steps: PositiveInt
    """Number of steps."""
    loss: LossFunction = next_token_loss
    """``loss(model, batch, key) -> Loss``, or with a fourth argument if ``frozen`` is passed to ``fit``."""
    optimizer: AdamWConfig | optax.GradientTransformation = AdamWConfig()
    """Any optax transformation, or the options of AdamW, which then follows ``learning_rate``."""
    learning_rate: float | Callable[[Any], Any] | None = None
    """The learning rate of AdamW: a number or a schedule. None warms up to 1e-3 in a tenth of the steps and decays along a cosine to a
    tenth. With an optax transformation it is only reported, so pass the schedule that the transformation uses, or None."""
    clip: Clip | None = None
    """Maximum norm of the gradient."""
    accumulate: PositiveInt = 1
    """Number of micro-batches that a batch is split into, to save memory."""
    workers: Workers | None = None
    """The workers that a 1-bit optimizer averages over. With ``num_workers`` they are simulated on one device; otherwise they are the devices
    along the axis of the mesh."""
    trainable: Any = None
    """Which parameters to train; see ``effscale.training.partition``. None trains all."""
    ema_decay: float | None = None
    """Decay of a moving average of the parameters; None keeps none."""
    changes: Changes | None = None
    """What changes on the way."""
    tokens_per_batch: Callable[[Any], Any] = count_tokens
    """The number of tokens that a batch adds to the count."""
    reports: Callable[[TrainState], Mapping[str, Any]] | None = None
    """A function from the new state to additional metrics of each step."""
    evaluation: Evaluation | Callable[[TrainState], Mapping[str, Any]] | None = None
    """Evaluation on held-out data, or a function from the state to metrics."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations by a function; an ``Evaluation`` has its own ``every``. None evaluates at the end."""
    checkpoint_every: PositiveInt | None = None
    """Steps between checkpoints; None writes one at the end and when the run is stopped."""
    keep: PositiveInt = 1
    """Number of checkpoints to keep."""
    log_every: PositiveInt = 1
    """Steps between records."""
    mesh: MeshConfig | jax.sharding.Mesh | None = None
    """The device mesh; None trains on one device."""

    def __post_init__(self):
        super().__post_init__()
        own = isinstance(self.optimizer, AdamWConfig)
        good = own or isinstance(self.optimizer, optax.GradientTransformation)
        check(self, good, "optimizer", "an optax transformation or an AdamWConfig")
        if own:
            rate = self.learning_rate
            good = rate is None or callable(rate) or rate >= 0
            check(self, good, "learning_rate", "at least 0, a schedule or None")
        if self.workers is not None and self.workers.num_workers is None:
            wanted = f"a mesh with the axis {self.workers.axis_name!r}, or workers with num_workers"
            check(self, self.mesh is not None, "mesh", wanted)

    @functools.cached_property
    def transformation(self) -> optax.GradientTransformation:
        """The optax transformation."""
        if isinstance(self.optimizer, AdamWConfig):
            assert self.schedule is not None
            return self.optimizer.build(self.schedule)
        return self.optimizer

    @functools.cached_property
    def schedule(self) -> Callable[[Any], Any] | None:
        """The learning rate as a schedule; None if it is unknown."""
        if callable(self.learning_rate):
            return self.learning_rate
        if self.learning_rate is not None:
            return Schedule(optax.constant_schedule(self.learning_rate))
        if not isinstance(self.optimizer, AdamWConfig):
            return None
        steps = self.num_steps
        config = ScheduleConfig(peak=1e-3, warmup=steps // 10, total=steps, final=1e-4)
        return config.build()

    @functools.cached_property
    def step(self) -> Callable[..., Any]:
        """The training step, not jitted: ``step(state, batch, *, frozen=None) -> (state, metrics)``."""
        axis = None if self.workers is None else self.workers.axis_name
        step = make_train_step(
            self.loss,
            self.transformation,
            accumulate=self.accumulate,
            clip=self.clip,
            ema_decay=self.ema_decay,
            trainable=self.trainable,
            learning_rate=self.schedule,
            tokens_per_batch=self.tokens_per_batch,
            axis_name=axis,
        )
        if self.workers is not None and axis is not None:
            simulated = self.workers.num_workers
            step = (
                per_worker(step) if simulated is None else simulate_workers(step, simulated, axis)
            )
        return step if self.reports is None else _reporting(step, self.reports)

    def create(
        self, seed: int = 0, model: Any = None, hyperparams: Mapping[str, Any] | None = None
    ) -> TrainState:
        """Return the state before the first step, under ``jax.eval_shape`` only its types; see ``fit_in`` for the arguments."""
        key = jax.random.key(seed)
        state = create_train_state(
            self._model(key) if model is None else jax.tree.map(jnp.copy, model),
            self.transformation,
            key=key,
            ema=self.ema_decay is not None,
            trainable=self.trainable,
        )
        held = state.opt_state
        for name, value in (hyperparams or {}).items():
            like = optax.tree.get(held, name)
            held = optax.tree.set(held, **{name: jnp.full_like(like, value)})
        return dataclasses.replace(state, opt_state=held)

    def fit(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        seed: int = 0,
        resume: bool = False,
        frozen: Any = None,
        mirror: str | None = None,
        quiet: bool = False,
    ) -> Trained:
        """Train, and write a run folder.

        The folder gets ``config.json``, ``metrics.jsonl``, TensorBoard events, checkpoints, ``results.json`` and
        ``report.md`` with a figure of the loss. A run that was killed or stopped continues exactly with ``resume=True``.

        Args:
            folder: The run folder; None chooses ``runs/<name of the loss>/<time>``.
            seed: Seed of the initial weights, the order of data and dropout.
            resume: Whether to continue the run in ``folder``.
            frozen: What the loss reads without training it, such as a teacher; its fourth argument.
            mirror: URL of a copy of the folder, updated every minute.
            quiet: Whether to leave out the progress bar.

        Raises:
            FileExistsError: The folder contains a run and ``resume`` is False.
            FileNotFoundError: There is no run to resume.
            CheckpointError: The run in the folder has other settings, or its checkpoints are damaged.
            StoppedBySignal: SIGTERM or Ctrl-C stopped the run, which has been saved.
            TrainingDivergedError: The loss or gradient was not finite for ten steps in a row.
        """
        began = time.perf_counter()
        config = self.describe() | {"seed": seed}
        name = getattr(self.loss, "__name__", "run").strip("<>")
        with RunFolder.create(
            folder, name=name, config=config, resume=resume, mirror=mirror
        ) as run_folder:
            trained = self.fit_in(
                run_folder.path,
                seed=seed,
                frozen=frozen,
                config=config,
                tensorboard=run_folder.tensorboard,
                quiet=quiet,
            )
            if jax.process_index() == 0:
                from effscale.training.plotting import loss_curve  # matplotlib is slow to import

                loss_curve(run_folder.figures / "loss.png", read_jsonl(run_folder.metrics_file))
                results = trained.metrics | {"seconds": time.perf_counter() - began}
                run_folder.write_results(results)
                run_folder.write_report(name, results)
        return trained

    def fit_in(
        self,
        place: pathlib.Path,
        *,
        seed: int = 0,
        model: Any = None,
        hyperparams: Mapping[str, Any] | None = None,
        frozen: Any = None,
        config: Any = None,
        tensorboard: pathlib.Path | None = None,
        compile_first: bool = False,
        quiet: bool = False,
    ) -> Trained:
        """Train in a folder that another object owns, such as a study: start, or continue from the newest checkpoint.

        Args:
            place: The folder of ``metrics.jsonl`` and ``checkpoints/``.
            seed: As for ``fit``.
            model: Begin with this model instead of the run's own, whose shapes it has; one compiled run then fine-tunes many.
            hyperparams: Values of an optimizer that was made with ``optax.inject_hyperparams``, instead of those in the run. One compiled
                run then serves all points of a search.
            frozen: As for ``fit``.
            config: Saved with the checkpoints; one with another config is refused.
            tensorboard: The folder of TensorBoard events; None writes none.
            compile_first: Whether to compile all shapes before the second step, so that no compilation shares the machine
                with timed steps.
            quiet: Whether to leave out the progress bar.

        Raises:
            StoppedBySignal: As for ``fit``.
        """
        mesh = self.device_mesh()
        with contextlib.ExitStack() as stack:
            if mesh is not None:
                stack.enter_context(jax.set_mesh(mesh))
            checkpoints = stack.enter_context(
                Checkpoints(
                    place / "checkpoints",
                    config=config,
                    keep=self.keep,
                    every=self.checkpoint_every,
                )
            )
            batches = _resumable(self._data(seed))
            create = functools.partial(self.create, seed, model, hyperparams)
            given = model is not None or isinstance(self.model, (str, os.PathLike))
            state, start = resume_or_start(
                checkpoints,
                create,
                batches,
                shardings=None if mesh is None else shardings(jax.eval_shape(create), mesh),
                trace_create=not given,
            )
            step: ShapeBuckets | StagedStep = self._compiled
            if isinstance(step, StagedStep) and start > 0:  # it skips the shapes of earlier stages
                step = self._staged()
                stack.callback(step.close)

            def before_step(number: int, batch: Any) -> Any:
                if not isinstance(step, StagedStep):
                    return batch
                if compile_first and number == start + 1:
                    step.wait()
                return step.before_step(number, batch)

            writers: list[Any] = []
            if jax.process_index() == 0:  # only the first of several processes writes
                writers.append(JsonlWriter(place / "metrics.jsonl", resume_step=start))
                if tensorboard is not None:
                    writers.append(TensorBoardWriter(tensorboard, resume_step=start))
                if not quiet:
                    writers.append(ConsoleWriter(self.num_steps, start_step=start))
            writer = RouterWatch(MultiWriter(writers))
            stack.callback(writer.close)
            evaluation = self.evaluation
            fitted = fit(
                state,
                step,
                batches,
                num_steps=self.num_steps,
                frozen=frozen,
                checkpoints=checkpoints,
                writer=writer,
                evaluate=None if evaluation is None else functools.partial(self._evaluate, mesh),
                eval_every=evaluation.every
                if isinstance(evaluation, Evaluation)
                else self.eval_every,
                log_every=self.log_every,
                place_batch=None if mesh is None else lambda batch: shard_batch(batch, mesh),
                before_step=before_step,
            )
        if fitted.stopped_reason == "signal":
            reached = int(fitted.state.step)
            raise StoppedBySignal(f"stopped and saved {place} at step {reached}", fitted.signal)
        metrics: dict[str, Any] = {}
        for record in read_jsonl(place / "metrics.jsonl"):
            metrics |= record
        return Trained(fitted.state, metrics, fitted.history, step.compilations)

    def lower(
        self,
        devices: Sequence[Any] | None = None,
        *,
        batch: Any = None,
        stage: int = -1,
        frozen: Callable[[], Any] | None = None,
    ) -> jax.stages.Lowered:
        """Lower the training step for a mesh of devices, which need not exist: nothing is computed.

        Args:
            devices: The devices, for instance of a topology of ``jax.experimental.topologies``; None uses those of this machine.
            batch: A batch, or the types of its arrays (``jax.ShapeDtypeStruct``); None reads the first one of ``data``.
            stage: The stage of ``changes``; the last one by default.
            frozen: A function that creates the ``frozen`` argument of ``fit``; None passes nothing.

        Returns:
            The lowered step; its ``compile()`` has the memory (``memory_analysis``) and the operations (``cost_analysis``).
        """
        mesh = self.device_mesh(devices) or MeshConfig().build(devices)
        batch = _without_values(next(iter(self._data(0))) if batch is None else batch)
        if self.changes is not None:
            batch = self.changes.shape_batch(batch, self.changes.stages.values[stage])
        types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        return lower_step(self.step, self.create, types, mesh, frozen=frozen)

    def plan(
        self,
        name: str,
        devices: Sequence[Any] | None = None,
        *,
        batch: Any = None,
        stage: int = -1,
        frozen: Callable[[], Any] | None = None,
    ) -> ProgramCost:
        """Return the memory and the time per step on a machine, which need not exist: nothing is computed.

        Args:
            name: The machine: a TPU topology such as ``v5p:8x8x8``, or a number of GPUs such as ``384xH100``.
            devices: Devices to compile for in place of the machine's, of the same number; None compiles for the machine itself, which needs its
                compiler (``aot-requirements.txt``).
            batch: As for ``lower``.
            stage: As for ``lower``.
            frozen: As for ``lower``.

        Raises:
            ValueError: The machine is unknown.

        Example:
            >>> import jax, jax.numpy as jnp, optax
            >>> from effscale.run import Run
            >>> from effscale.training import Loss
            >>> def loss(params, batch, key):
            ...     return Loss((batch["x"] @ params["w"]).sum(), jnp.float32(8))
            >>> run = Run(model={"w": jnp.zeros((4, 2))}, loss=loss, optimizer=optax.sgd(0.1), num_steps=5)
            >>> cost = run.plan("1xH100", jax.devices()[:1], batch={"x": jnp.ones((8, 4))})
            >>> cost.fits, cost.operations  # 2 * 8 * 4 * 2, forward and for the gradient of w
            (True, 256.0)
        """
        where = machine(name)
        if devices is None:
            devices = where.target.devices()[: where.count]
        batch = _without_values(next(iter(self._data(0))) if batch is None else batch)
        lowered = self.lower(devices, batch=batch, stage=stage, frozen=frozen)
        mesh = self.device_mesh(devices) or MeshConfig().build(devices)
        if self.changes is not None:
            batch = self.changes.shape_batch(batch, self.changes.stages.values[stage])
        given = {} if frozen is None else {"frozen": jax.eval_shape(frozen)}
        with jax.set_mesh(mesh):
            traced = jax.make_jaxpr(self.step)(jax.eval_shape(self.create), batch, **given)
        return program_cost(lowered.compile(), matmul_operations(traced), mesh.shape, where)

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values, for ``config.json``: functions by name, models and other objects by type and size."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: _described(value) for name, value in fields.items() if value is not None}

    def _model(self, key: jax.Array) -> Any:
        model = self.model
        if isinstance(model, TransformerConfig):
            return jax.jit(lambda key: Transformer(model, rngs=nnx.Rngs(key)))(key)
        if isinstance(model, (str, os.PathLike)):
            from effscale.interop import load_pretrained  # other runs need no format of files

            return load_pretrained(model)
        if _is_function(model):
            return model(key)
        return jax.tree.map(jnp.copy, model)  # the training step donates its arrays

    def _data(self, seed: int) -> Iterable[Any]:
        check(self, self.data is not None, "data", "given")
        return self.data(seed) if _is_function(self.data) else self.data

    def device_mesh(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh | None:
        """Return the mesh of these devices, or of all devices of this machine; None for one device."""
        return self.mesh.build(devices) if isinstance(self.mesh, MeshConfig) else self.mesh

    @functools.cached_property
    def _compiled(self) -> ShapeBuckets | StagedStep:
        """The step with one executable per shape, shared by the runs with other seeds."""
        if self.changes is None:
            return ShapeBuckets(self.step, donate_argnums=0)
        return self._staged()

    def _staged(self) -> StagedStep:
        assert self.changes is not None
        mesh = self.device_mesh()
        place = None if mesh is None else functools.partial(shard_batch, mesh=mesh)
        return StagedStep(self.step, *self.changes, place_batch=place)

    def _evaluate(self, mesh: jax.sharding.Mesh | None, state: TrainState) -> Mapping[str, Any]:
        assert self.evaluation is not None
        if not isinstance(self.evaluation, Evaluation):
            return self.evaluation(state)
        place = None if mesh is None else functools.partial(shard_batch, mesh=mesh)
        last = int(state.step) == self.num_steps
        return self.evaluation(state.model, last=last, place_batch=place)


_FREE = ("evaluation", "eval_every", "checkpoint_every", "keep", "log_every", "mesh")
# What may differ when a run is resumed.


class _Replayed:
    """Batches of an iterator that cannot be set to a position: to resume, read again what was consumed."""

    def __init__(self, batches: Iterator[Any]):
        self._batches, self._count = batches, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        self._count += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"batches": self._count}

    def set_state(self, state: Mapping[str, int]) -> None:
        for _ in range(state["batches"] - self._count):
            next(self)


def _resumable(batches: Iterable[Any]) -> Any:
    iterator = iter(batches)
    return iterator if hasattr(iterator, "get_state") else _Replayed(iterator)


def _is_function(value: Any) -> bool:
    """Return whether a value is a function rather than a tree of arrays that can be called, such as a module."""
    return callable(value) and not _arrays(value)


def _without_values(batch: Any) -> Any:
    """Return arrays of zeros with the shapes of a batch that take no memory."""
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), batch)


def _reporting(step: Callable[..., Any], reports: Callable[..., Any]) -> Callable[..., Any]:
    def reporting(state: Any, batch: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        state, metrics = step(state, batch, **kwargs)
        return state, {**metrics, **reports(state)}

    return reporting


def _described(value: Any) -> Any:
    if isinstance(value, functools.partial):
        return {
            "function": _described(value.func),
            "arguments": _described([value.args, value.keywords]),
        }
    if isinstance(value, type) or _is_function(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"{value.__module__}.{name}"
    if isinstance(value, Mapping) and not _arrays(value):
        return {str(key): _described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not _arrays(value):
        return [_described(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {f.name: _described(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if value is None or isinstance(value, (bool, int, float, str, os.PathLike)):
        return to_json(value)
    arrays = _arrays(value)
    size = {"arrays": len(arrays), "numbers": sum(x.size for x in arrays)} if arrays else {}
    return {"type": f"{type(value).__module__}.{type(value).__qualname__}"} | size


def _arrays(value: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(value) if hasattr(x, "dtype")]
