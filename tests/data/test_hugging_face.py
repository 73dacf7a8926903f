import json
import sys
import types

import pytest

from effscale.data import DocumentError, HuggingFace, SkipReport


@pytest.fixture
def fake(monkeypatch):
    """A stand-in for the datasets library that records how it is called."""
    module = types.ModuleType("datasets")
    module.calls = []
    rows = [{"text": "one"}, {"text": None}, {"body": "x"}, {"text": "two"}]

    def load_dataset(name, config, *, split, streaming):
        module.calls.append((name, config, split, streaming))
        if split == "absent":
            raise ValueError("Bad split: absent. Available splits: ['train']")
        return iter(rows)

    def load_from_disk(folder):
        module.calls.append(folder)
        return {"train": rows[:1]}

    module.load_dataset, module.load_from_disk = load_dataset, load_from_disk
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_name_is_streamed(fake):
    report = SkipReport()
    source = HuggingFace(name="owner/data", config="raw", on_error="skip")
    assert [d.text for d in source.documents(report)] == ["one", "two"]
    assert fake.calls == [("owner/data", "raw", "train", True)]
    assert report.counts == {"not_text": 1, "missing_field": 1}
    with pytest.raises(DocumentError, match=r"owner/data\[train\]:row 2: NoneType"):
        list(HuggingFace(name="owner/data").documents())


def test_a_saved_folder_is_mapped_and_a_wrong_split_named(fake, tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert [d.text for d in HuggingFace(name=tmp_path).documents()] == ["one"]
    with pytest.raises(ValueError, match=r"the folder has the splits \['train'\]"):
        list(HuggingFace(name=tmp_path, split="test").documents())
    with pytest.raises(ValueError, match=r"no such local folder.*Available splits"):
        list(HuggingFace(name="owner/data", split="absent").documents())


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'effscale\[hf\]'"):
        list(HuggingFace(name="owner/data").documents())
    with pytest.raises(ValueError, match=r"name must be .*got ''"):
        HuggingFace(name="")


@pytest.mark.filterwarnings("default")
def test_real_folders_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    data = datasets.Dataset.from_dict({"text": ["one", "two"]})
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "dict")
    data.save_to_disk(tmp_path / "single")
    (tmp_path / "files").mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in ("one", "two")]
    (tmp_path / "files" / "train.jsonl").write_text("".join(lines))
    for name in ("dict", "single", "files"):
        source = HuggingFace(name=tmp_path / name)
        assert [document.text for document in source.documents()] == ["one", "two"]
        assert source.fingerprint() == source.fingerprint()
