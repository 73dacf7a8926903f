"""Peak memory and time of loading a model folder of 1 GB (a GPT-2 of 250M parameters in float32).

Peak memory is the growth of the process's peak resident memory during loading, after all imports. The folder is
created once, in a temporary location, and is in the page cache.
"""

import os
import pathlib
import tempfile
import time

import harness

FOLDER = pathlib.Path(tempfile.gettempdir()) / "effscale-benchmark-load"


def effscale(mesh_of: int = 1) -> dict[str, float]:
    import jax

    jax.config.update("jax_num_cpu_devices", mesh_of)
    from effscale.interop import load_pretrained
    from effscale.parallel import MeshConfig

    mesh = MeshConfig(fsdp=mesh_of // 2, tensor=2, data=1).build() if mesh_of > 1 else None
    jax.block_until_ready(jax.numpy.zeros(3) + 1)
    touch = lambda model: [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(model)]
    return measure(lambda: jax.block_until_ready(load_pretrained(FOLDER, mesh=mesh)), touch)


def pytorch() -> dict[str, float]:
    import transformers

    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2))
    touch = lambda model: [parameter.max() for parameter in model.parameters()]
    return measure(lambda: transformers.AutoModelForCausalLM.from_pretrained(FOLDER), touch)


def measure(load, touch) -> dict[str, float]:
    before, began = peak_memory(), time.perf_counter()
    model = load()
    touch(model)  # a mapped file is not yet loaded
    took, grown = time.perf_counter() - began, peak_memory() - before
    size = (FOLDER / "model.safetensors").stat().st_size
    return {"peak_over_size": grown / size, "seconds": took, "size_gb": size / 1e9}


def peak_memory() -> int:
    """Return the peak resident memory of this process; getrusage would include that of its parent process."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def make_folder() -> None:
    import jax
    from flax import nnx

    from effscale.interop import save_pretrained
    from effscale.models import Transformer, gpt2

    config = gpt2(num_layers=18, d_model=1024, num_heads=16, vocab_size=22000)
    model = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    save_pretrained(model, FOLDER)


def report(medians: dict[str, dict[str, float]]) -> str:
    return "\n".join(
        f"{name}: {values['peak_over_size']:.2f} x the model's bytes, {values['seconds']:.2f} s"
        for name, values in medians.items()
    )


if __name__ == "__main__":
    if not (FOLDER / "config.json").exists():
        make_folder()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    harness.main(
        {
            "effscale": effscale,
            "effscale, 8 virtual devices": lambda: effscale(8),
            "transformers": pytorch,
            "effscale@newest": effscale,
        },
        rounds=3,
        report=report,
    )
