"""Time cross entropy over a vocabulary with its gradients: chunked, plain, in PyTorch, and lower bounds.

    python benchmarks/cross_entropy.py
    python benchmarks/cross_entropy.py --python .venv/bin/python .venv-newest/bin/python

Each interpreter runs the JAX candidates in one process and PyTorch, if it can be imported, in another. The processes
run for the whole benchmark and take turns, one candidate at a time, so that changes of the machine's speed affect all
of them; the table has medians. The rate counts the three matrix products, 6 tokens d vocab operations, whatever the
candidate actually computes. Two rows are bounds for comparison: `products`, only these three products on whole
arrays, and `square`, the rate of a 2048 x 2048 x 2048 product.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from benchmarks.kernels.cross_entropy import Shape, with_tag

SQUARE = 2048


def jax_contestants(shape: Shape) -> dict:
    """Return functions without arguments that return when their arrays are ready."""
    import jax
    import jax.numpy as jnp

    import kernels_pallas

    operands = shape.operands(jax.random.key(0))
    hidden, weight, _, labels, weights = operands

    def gradient(implementation):
        def loss(hidden, weight):
            return kernels_pallas.cross_entropy(
                hidden, weight, labels, weights=weights, implementation=implementation
            )

        function = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return lambda: jax.block_until_ready(function(hidden, weight))

    logits = jnp.ones((shape.tokens, shape.vocab), shape.dtype)
    low = weight.astype(shape.dtype)
    square = jnp.ones((SQUARE, SQUARE), shape.dtype)

    @jax.jit
    def products(hidden, weight, logits):
        make = lambda equation, *arrays: jnp.einsum(
            equation, *arrays, preferred_element_type=jnp.float32
        )
        return (
            make("td,vd->tv", hidden, weight),
            make("tv,vd->td", logits, weight),
            make("tv,td->vd", logits, hidden),
        )

    multiply = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    return {
        "chunked": gradient("chunked"),
        "plain": gradient("reference"),
        "products": lambda: jax.block_until_ready(products(hidden, low, logits)),
        "square": lambda: jax.block_until_ready(multiply(square)),
    }


def torch_contestants(shape: Shape) -> dict:
    """Return PyTorch's own version: whole logits, gradient by autograd."""
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    hidden = torch.randn(shape.tokens, shape.d, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(shape.vocab, shape.d, generator=generator) * shape.d**-0.5
    weight.requires_grad_()
    labels = torch.randint(shape.vocab, (shape.tokens,), generator=generator)

    def run():
        hidden.grad = weight.grad = None
        logits = functional.linear(hidden, weight.to(dtype))
        functional.cross_entropy(logits.float(), labels, reduction="sum").backward()

    return {"torch": run}


def worker(kind: str) -> None:
    """Answer requests on stdin (a shape and a candidate) with the milliseconds of some runs."""
    make = {"jax": jax_contestants, "torch": torch_contestants}[kind]
    version = __import__(kind).__version__
    print(json.dumps({"version": version}), flush=True)
    made: dict[str, dict] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["shape"]
        if name not in made:
            made.clear()  # keep the arrays of only one shape
            made[name] = make(next(shape for shape in with_tag("bench") if shape.name == name))
        run = made[name][request["contestant"]]
        run()
        times = []
        for _ in range(request["repeats"]):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        print(json.dumps(times), flush=True)


class Worker:
    """A process of an interpreter."""

    def __init__(self, python: str, kind: str):
        command = [python, __file__, "--worker", kind]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.kind, self.version = kind, self._answer()["version"]

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.kind} process ended with {self.process.wait()}")
        return json.loads(line)

    def time(self, shape: str, contestant: str, repeats: int) -> list[float]:
        """Return the milliseconds of some runs of one candidate, after a warmup run."""
        request = {"shape": shape, "contestant": contestant, "repeats": repeats}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process by closing its input."""
        self.process.stdin.close()
        self.process.wait()


def workers_of(python: str) -> list[Worker]:
    probe = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    return [Worker(python, kind) for kind in ("jax", *(["torch"] if probe.returncode == 0 else []))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [shape.name for shape in with_tag("bench")]
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="runs per round")
    parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    workers = [worker for python in arguments.python for worker in workers_of(python)]
    contestants = {"jax": ("chunked", "plain", "products", "square"), "torch": ("torch",)}
    print(
        "| shape | tokens x d x vocab | contestant | version | ms | GFLOP/s |\n|---|---|---|---|---:|---:|"
    )
    for shape in with_tag("bench"):
        if shape.name not in arguments.shapes:
            continue
        turns = [(worker, name) for worker in workers for name in contestants[worker.kind]]
        times: dict[tuple, list[float]] = {turn: [] for turn in turns}
        for _ in range(arguments.rounds):
            for instance, name in turns:
                times[instance, name] += instance.time(shape.name, name, arguments.repeats)
        for (instance, name), found in times.items():
            middle = statistics.median(found)
            flops = 2 * SQUARE**3 if name == "square" else shape.flops()
            size = f"{shape.tokens} x {shape.d} x {shape.vocab} {shape.dtype}"
            version = f"{instance.kind} {instance.version}"
            print(
                f"| {shape.name} | {size} | {name} | {version} | {middle:.1f} | {flops / middle / 1e6:.0f} |",
                flush=True,
            )
    for instance in workers:
        instance.close()


if __name__ == "__main__":
    main()
