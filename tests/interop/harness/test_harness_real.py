"""SmolLM2 on tasks of the harness, here and in its ``hf`` model; `make assets` installs the weights."""

import numpy as np
import pytest

from effscale.experiments.shared import assets
from effscale.interop import load_pretrained, save_pretrained
from effscale.interop.harness import HarnessModel
from tests.interop.harness.harness_tasks import write_tasks

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.slow  # two minutes; random models are compared in the quick tests
def test_smollm2_s_results_are_those_of_the_hf_model(tmp_path, monkeypatch):
    """Of multiple choice, perplexity in windows of 128 tokens, and generated text; also question by question."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DISABLE_MULTIPROC", "")
    monkeypatch.delenv("DISABLE_MULTIPROC")  # a model sets it, and the test's end takes it back
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    try:
        file = assets.smollm2_file()
    except assets.MissingAssetError as error:
        pytest.skip(str(error))
    folder, tasks = tmp_path / "smollm2", tmp_path / "tasks"
    tasks.mkdir()
    names = write_tasks(tasks, functions=24, texts=6)
    save_pretrained(load_pretrained(file, dtype="float32"), folder, like=file)
    options = {"batch_size": 8, "max_length": 128}
    results = []
    for lm in (
        HarnessModel(folder, **options),
        HFLM(pretrained=str(folder), device="cpu", dtype="float32", **options),
    ):
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        results.append(
            simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=100)
        )
    ours, theirs = results
    for name in names:
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), metric
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            if name == "modules":
                assert mine["resps"] == other["resps"]
            else:
                each = lambda sample: np.array(
                    [np.ravel(answer[0])[0] for answer in sample["resps"]], float
                )
                np.testing.assert_allclose(each(mine), each(other), atol=1e-4, rtol=1e-5)
    # A model that knows nothing is right in a quarter.
    assert ours["results"]["functions"]["acc,none"] > 0.4
