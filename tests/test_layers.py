"""Who may import whom: the contracts of pyproject.toml hold, and would notice a breach."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def lint(folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    linter = pathlib.Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter comes with the dependency group 'dev'")
    code = (
        f"import sys; sys.path[:0] = [{str(folder / 'src')!r}, {str(folder)!r}]\n"
        "from importlinter.cli import lint_imports_command\n"
        "lint_imports_command(['--no-cache'])\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def copy(tmp_path):
    for package in ("src/effscale", "kernels_pallas"):
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold(copy):
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("kernels_pallas/dispatch.py", "import effscale.models", "Layers point downwards"),
        ("src/effscale/models/mlp.py", "import effscale.training", "Layers point downwards"),
        ("src/effscale/parallel/mesh.py", "from effscale import models", "Layers point downwards"),
        ("src/effscale/data/store.py", "import effscale.experiments", "Layers point downwards"),
        ("src/effscale/training/loss.py", "import torch", "The core runs without torch"),
        (
            "src/effscale/experiments/onebit/optimizers.py",
            "import effscale.experiments.finetune",
            "No experiment imports another",
        ),
    ],
)
def test_a_breach_is_noticed(copy, file, line, contract):
    with open(copy / file, "a", encoding="utf-8") as stream:
        stream.write(f"\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1
    assert f"{contract}" in done.stdout.split("Broken contracts")[1]


def test_a_technique_may_not_import_another(copy):
    for name, line in {"moe": "", "quant": "import effscale.models\nimport effscale.moe\n"}.items():
        (copy / "src" / "effscale" / name).mkdir(exist_ok=True)
        (copy / "src" / "effscale" / name / "__init__.py").write_text(line)
    done = lint(copy)
    assert done.returncode == 1
    assert "effscale.quant is not allowed to import effscale.moe" in done.stdout


def test_importing_the_package_imports_nothing():
    code = "import sys, effscale; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


SLOW = ("matplotlib", "orbax", "grain", "tensorboardX", "tokenizers", "pyarrow", "torch", "tyro")


@pytest.mark.parametrize(
    ("package", "absent", "most"),
    [
        ("optim", ("flax", *SLOW), 50),
        ("parallel", ("flax", *SLOW), 50),
        ("ltd", SLOW, 60),
        ("models", SLOW, 50),
        ("moe", SLOW, 70),
        ("quant", SLOW, 80),
        ("generation", SLOW, 50),
        ("training", ("rich.progress", *SLOW), 80),
        ("rlhf", ("effscale.data", "effscale.rlhf.data"), 60),
        ("rlhf.data", ("jinja2", "datasets", "grain", "pyarrow", "torch", "effscale.interop"), 50),
    ],
)
def test_public_names_import_little(package, absent, most):
    code = (
        f"import sys\nfrom effscale.{package} import *\n"
        f"print([name for name in {absent} if name in sys.modules])\n"
        "print(sum(name.startswith('effscale.') for name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow, count = done.stdout.splitlines()
    assert slow == "[]"
    assert int(count) <= most


def test_a_lazy_function_keeps_the_name_of_its_module():
    code = (
        "import effscale.optim\nfrom effscale.optim.lamb import lamb as same\n"
        "from effscale.optim import lamb\n"
        "assert callable(lamb) and effscale.optim.lamb is lamb and same is lamb\n"
        "try: effscale.optim.Lamb\nexcept AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'effscale.optim' has no attribute 'Lamb'\n"
