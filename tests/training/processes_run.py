"""A run of several processes over one mesh, for ``test_processes.py``: ``processes_run.py FOLDER NUM_STEPS [term:STEP | kill:STEP]``."""

import importlib.util
import json
import os
import pathlib
import signal
import sys
import time

import jax
from flax import nnx

from effscale.parallel import DistributedConfig, batch_shard, ending_together, initialize

initialize(DistributedConfig())

from effscale.training import (  # noqa: E402, after the processes have found each other
    AdamWConfig,
    Checkpoints,
    JsonlWriter,
    RunFolder,
    ShapeBuckets,
    create_train_state,
    fit,
    make_train_step,
    resume_or_start,
)

spec = importlib.util.spec_from_file_location(
    "toy_run", pathlib.Path(__file__).with_name("toy_run.py")
)
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)

folder, num_steps = sys.argv[1], int(sys.argv[2])
kind, _, at = (sys.argv[3] if len(sys.argv) > 3 else "never:-1").partition(":")
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
optimizer = AdamWConfig().build(1e-2)
create = lambda: create_train_state(toy.Toy(rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0))
shardings = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), jax.eval_shape(create))
last = jax.process_index() == jax.process_count() - 1
read = {}


def place(batch):
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def before_step(step, batch):
    read[step + 1] = batch.pop("row").tolist()
    if step == int(at) and kind == "term" and last:  # a scheduler may warn one process only
        os.kill(os.getpid(), signal.SIGTERM)
    if step == int(at) and kind == "kill":
        checkpoints.wait()  # however slow the machine: this is a kill between checkpoints
        print("read", json.dumps(read), flush=True)
        time.sleep(1)  # until the others have printed
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
    return batch


with ending_together():
    run = RunFolder.create(folder, resume=os.path.exists(folder) and bool(os.listdir(folder)))
    part = batch_shard(mesh)
    data = toy.numbered_batches(part.index, part.count)
    checkpoints = Checkpoints(run.checkpoints, every=3, keep=2)
    state, start = resume_or_start(checkpoints, create, data, shardings=shardings)
    writer = JsonlWriter(run.metrics_file, resume_step=start) if jax.process_index() == 0 else None
    step = ShapeBuckets(make_train_step(toy.loss_fn, optimizer, accumulate=2), donate_argnums=0)
    with jax.set_mesh(mesh):
        result = fit(
            state,
            step,
            data,
            num_steps=num_steps,
            checkpoints=checkpoints,
            writer=writer,
            place_batch=place,
            before_step=before_step,
            sync_every=4,
        )
    report = {
        "start": start,
        "step": int(result.state.step),
        "reason": result.stopped_reason,
        "compilations": step.num_compilations,
        "checkpoints": checkpoints.steps,
    }
    print("read", json.dumps(read), flush=True)
    print("report", json.dumps(report), flush=True)
