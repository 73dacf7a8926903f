"""Decoding of SmolLM2-135M, one row on one core: tokens per second of CPU time, compared with transformers and
llama.cpp.

Real weights (`make assets`; set the variable SMOLLM2 to the file for a Python without them); greedy, after a prompt
of 5 tokens. All weights are read for each token. llama.cpp is included if it is installed (`pip install --no-deps
xllamacpp`): with the package's own file, and with copies of it with matrices in Q8_0 and in Q4_0.
"""

import importlib.util

import harness

NEW, FIRST = 34, 2


def effscale() -> dict[str, float]:
    import os

    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    one_core()
    import jax
    import jax.numpy as jnp

    from effscale.generation import SamplingConfig
    from effscale.generation.decoding import decode
    from effscale.interop import load_pretrained
    from effscale.models import unroll
    from effscale.quant import Format, Recipe, Rule, quantize_model

    model = load_pretrained(smollm2())
    tokens = Format(granularity="token")

    def quantized(bits: int) -> object:
        table = Rule(where=r"embed\.tokens\.embedding", weights=Format(), activations=tokens)
        layers = Rule(where=r"layers\..*kernel", weights=Format(bits=bits), activations=tokens)
        return quantize_model(model, Recipe((layers, table)))

    prompt = jnp.arange(100, 105, dtype=jnp.int32)[None]
    found = {}
    for name, make in {
        "float32": lambda: model,
        "w8a8": lambda: quantized(8),
        "w4a8": lambda: quantized(4),
    }.items():
        own = jax.block_until_ready(unroll(make()))
        seconds = [
            cpu_seconds(
                lambda new=new, own=own: jax.block_until_ready(
                    decode(own, prompt, SamplingConfig(max_new_tokens=new, temperature=0.0))
                )
            )
            for new in (FIRST, NEW)
        ]
        found[f"{name}_tokens_per_second"] = (NEW - FIRST) / (seconds[1] - seconds[0])
    return found


def transformers() -> dict[str, float]:
    one_core()
    import torch
    import transformers as hf

    torch.set_num_threads(1)
    file = smollm2()
    model = hf.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    ).eval()
    ids = torch.arange(100, 105)[None]

    def generate(new: int) -> None:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=2, **options)

    seconds = [cpu_seconds(lambda new=new: generate(new)) for new in (FIRST, NEW)]
    return {"float32_tokens_per_second": (NEW - FIRST) / (seconds[1] - seconds[0])}


def llama_cpp() -> dict[str, float]:
    one_core()
    import pathlib
    import tempfile

    import xllamacpp

    def generate(server, new: int) -> None:
        options = {"n_predict": new, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        done = server.handle_completions({"prompt": list(range(100, 105)), **options})
        assert done["usage"]["completion_tokens"] == new, done

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("Q4_1", "Q8_0", "Q4_0"):
            file = smollm2() if name == "Q4_1" else pathlib.Path(folder) / f"{name}.gguf"
            if name != "Q4_1":
                write_again(smollm2(), file, name)
            options = xllamacpp.CommonParams()
            options.model.path = str(file)
            options.n_ctx, options.n_parallel = 256, 1
            options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
            server = xllamacpp.Server(options)
            seconds = [
                cpu_seconds(lambda new=new, server=server: generate(server, new))
                for new in (FIRST, NEW)
            ]
            found[f"{name}_tokens_per_second"] = (NEW - FIRST) / (seconds[1] - seconds[0])
            del server
    return found


def write_again(source, target, kind: str) -> None:
    """Copy a GGUF file with its matrices in another format."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    of = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        as_read = tensor.tensor_type == gguf.GGMLQuantizationType.F32
        data = values if as_read else gguf.quantize(values, of)
        writer.add_tensor(tensor.name, data, raw_dtype=None if as_read else of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def one_core() -> None:
    """Restrict this process to a single core."""
    import os

    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})


def cpu_seconds(call) -> float:
    """Return the minimum CPU time of three calls, after one that compiles."""
    import time

    call()
    times = []
    for _ in range(3):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def smollm2():
    """Return the model's file, wherever its package is installed."""
    import os
    import pathlib

    from effscale.experiments.shared import assets

    given = os.environ.get("SMOLLM2")
    return pathlib.Path(given) if given else assets.smollm2_file()


def report(medians: dict[str, dict[str, float]]) -> str:
    base = medians["transformers"]["float32_tokens_per_second"]
    return "\n".join(
        f"{worker}, {name.removesuffix('_tokens_per_second')}: {value / base:.2f} x transformers' float32"
        for worker, values in medians.items()
        for name, value in values.items()
        if name.endswith("_tokens_per_second")
    )


if __name__ == "__main__":
    workers = {"effscale": effscale, "effscale@newest": effscale, "transformers": transformers}
    if importlib.util.find_spec("xllamacpp"):
        workers["llama.cpp"] = llama_cpp
    harness.main(workers, rounds=3, report=report)
