"""The command line: inspect, convert and compare."""

import json
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from effscale.data import train_tokenizer
from effscale.interop import load_pretrained, load_tokenizer, save_pretrained
from effscale.interop.__main__ import main
from effscale.models import Transformer, bert, bert_pretraining_heads, gpt2, llama, vit

TINY = {"num_layers": 2, "d_model": 16, "num_heads": 2}


@pytest.fixture
def folder(tmp_path):
    tokenizer = train_tokenizer(["a little text to learn from"] * 3, vocab_size=262)
    config = llama(**TINY, num_kv_heads=1, d_ff=24, vocab_size=262)
    model = Transformer(config, rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path / "model", tokenizer=tokenizer)
    return tmp_path / "model"


def test_inspect_tells_what_it_is(folder, capsys):
    main(["inspect", str(folder), "--tensors"])
    shown = capsys.readouterr().out
    for part in ("llama", "LlamaForCausalLM", "key and value: 1", "float32", "262"):
        assert part in shown
    assert "layers.1.self_attn.k_proj.weight  [8, 16] float32" in shown
    assert "groups.0.blocks.0.attention.key.kernel[1]  (o i -> i o)" in shown
    count = sum(x.size for x in load_file(folder / "model.safetensors").values())
    assert f"{count:,}" in shown


def test_convert_changes_the_type_and_the_size_of_files(folder, tmp_path, capsys):
    out = tmp_path / "out"
    main(["convert", str(folder), str(out), "--dtype", "bfloat16", "--max-shard-size", "5KB"])
    assert str(out) in capsys.readouterr().out
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = load_pretrained(folder, dtype="bfloat16"), load_pretrained(out)
    for a, b in zip(nnx.to_pure_dict(nnx.state(before))["embed"]["tokens"].values(),
                    nnx.to_pure_dict(nnx.state(after))["embed"]["tokens"].values(), strict=True):  # fmt: skip
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert load_tokenizer(out).get_vocab() == load_tokenizer(folder).get_vocab()


def test_errors_are_messages(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "nowhere" in shown


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys; from effscale.interop.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout


@pytest.mark.parametrize(
    "config",
    [
        gpt2(**TINY, vocab_size=64, max_length=32),
        bert(**TINY, vocab_size=64, max_length=32, heads=bert_pretraining_heads()),
        vit(**TINY, image_size=8, patch_size=4, num_classes=3),
    ],
    ids=["gpt2", "bert", "vit"],
)
def test_compare_finds_no_difference_and_finds_one(config, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch", reason="the other side of the comparison is PyTorch")
    pytest.importorskip("transformers", reason="the other side of the comparison is transformers")
    from effscale.interop import compare

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_pretrained(Transformer(config, rngs=nnx.Rngs(0)), tmp_path)
    rows = {row.name: row for row in compare.compare(tmp_path)}
    assert {"embeddings", "layer 1", "layer 2"} < set(rows)
    assert set(rows) & {"lm", "mlm", "classes"}
    assert all(row.largest <= 1e-5 * max(row.scale, 1) for row in rows.values()), rows

    # A model that differs in its second layer shows where.
    sound = compare.load_pretrained

    def damaged(*args, **kwargs):
        model = sound(*args, **kwargs)
        kernel = model.groups[0].blocks[0].feed_forward.down.kernel
        kernel.set_value(kernel.get_value().at[1, :, 0].add(1.0))
        return model

    monkeypatch.setattr(compare, "load_pretrained", damaged)
    main(["compare", str(tmp_path)])
    assert "layer 2" in capsys.readouterr().out
    rows = {row.name: row for row in compare.compare(tmp_path)}
    assert rows["layer 1"].largest < 1e-5 < 1e-2 < rows["layer 2"].largest
