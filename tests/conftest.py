"""What every test stands on: strict JAX, eight virtual CPU devices, a compilation cache that outlives the run."""

import gc
import os
import pathlib
import re
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Most of the suite's time is compilation of programs that run once: LLVM's passes are not worth theirs.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        # A program in one piece and not in up to 32 that are compiled at the same time: a third less work on JAX 0.10, a tenth
        # less on 0.12, and the workers of pytest keep the cores busy.
        "--xla_cpu_parallel_codegen_split_count=1",
        # The older emitters of JAX 0.10 compile in less than half of the time (1.5 s and not 4.2 s for a small GPT's
        # training step). They round otherwise, so tests of exact numbers, marked so, do without.
        "--xla_cpu_use_fusion_emitters=false"
        if "EFFSCALE_QUICK_EMITTERS" in os.environ and version("jaxlib").startswith("0.10.")
        else "",
    ]
)

import hypothesis
import jax
import jaxtyping
import pytest

CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

hypothesis.settings.register_profile(
    "effscale",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("effscale")


MEMORY_MAPS = pathlib.Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Lets go of compiled programs when there are many: each is a few memory maps, and Linux gives a process 65,530."""
    yield
    if MEMORY_MAPS.exists() and MEMORY_MAPS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def getkey():
    """A callable that gives a fresh PRNG key at each call, the same ones in every run."""
    keys = iter(range(2**31))
    return lambda: jax.random.fold_in(jax.random.key(2022), next(keys))


@pytest.fixture
def unchecked(monkeypatch):
    """Without the run-time type check of the tests, as users run it: that would refuse wrong values before the library does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# The legs of CI share the suite (.ci/run). What newer versions of JAX and Flax can break runs on the newest Python, without PyTorch;
# the rest, and each file that needs PyTorch or what is installed with it, on the first. Without --leg, everything runs.
TESTS = pathlib.Path(__file__).resolve().parent
NEWEST = [
    "chat",
    "experiments",
    "kernels_pallas",
    "ltd",
    "models",
    "optim",
    "parallel",
    "plan",
    "quant",
    "rlhf",
    "training",
]
WITH_TORCH = re.compile(
    r'importorskip\(\s*"(torch|transformers|compressed_tensors|moto|gcsfs)|MissingAssetError'
)


def leg_of(file: pathlib.Path) -> str:
    """The leg that runs a test file."""
    on_newest = file.relative_to(TESTS).parts[0] in NEWEST
    needs_torch = WITH_TORCH.search(file.read_text(encoding="utf-8"))
    return "newest" if on_newest and not needs_torch else "first"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--leg", choices=("first", "newest"), help="only the tests of one leg of CI")


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config):
    """Only test files (--doctest-modules would import the programs that tests start, too), and of them those that can be wanted."""
    if TESTS not in collection_path.parents or collection_path.suffix != ".py":
        return None
    if not collection_path.name.startswith("test_"):
        return True
    if config.getoption("leg") not in (None, leg_of(collection_path)):
        return True
    only_exact = config.option.markexpr.endswith("and exact")
    return True if only_exact and "mark.exact" not in collection_path.read_text() else None
