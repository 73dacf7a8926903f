"""The three questions of lm-evaluation-harness: the same answers as from its own ``hf`` model, for the same weights."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from tokenizers import processors

from effscale.data import train_tokenizer
from effscale.evaluation import rank_answers, text_log_probs
from effscale.interop import FolderError, save_pretrained
from effscale.interop.harness import HarnessModel
from effscale.interop.harness.__main__ import main
from effscale.interop.harness.codec import codec_of
from effscale.interop.harness.requests import sampling_of
from effscale.models import ClassHead, Transformer, abstract_model, gpt2
from effscale.models.grouping import group_layers
from effscale.moe import MoEConfig
from effscale.quant import quantize_model, w8a8
from tests.interop.harness.harness_tasks import write_tasks

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It is not amused.",
    "Is it so? yes no maybe not at all",
    "All that is gold does not glitter, not all those who wander are lost; the old that is strong does not wither.",
]
LENGTH = 32


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DISABLE_MULTIPROC", "")
    monkeypatch.delenv("DISABLE_MULTIPROC")  # a model sets it, and the test's end takes it back
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        TEXTS * 3, vocab_size=300, special_tokens=("<|endoftext|>", "<s>", "</s>")
    )


def requests(kind, *arguments):
    return [Instance(kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


SCORED = requests(
    "loglikelihood",
    ("Is it so?", " yes"),
    ("Is it so?", " no"),
    ("Is it so?", " maybe not"),
    ("Is it so? ", "yes"),  # the space becomes the answer's
    ("", "The quick brown fox"),
    ("", "<s>The quick"),  # begins with what is put before it otherwise
    ("<s>Is it so?", " yes"),
    (TEXTS[2] * 2, " not all"),  # longer than the model can read
    (TEXTS[0] * 3, TEXTS[1]),
)
ROLLED = requests("loglikelihood_rolling", (TEXTS[1],), ("",), (TEXTS[2] * 3,), ("Is",))
TURNED = {"until": ["e", "th"], "max_gen_toks": 12}
SAID = requests(
    "generate_until",
    ("Is it so?", TURNED),
    (TEXTS[2] * 2, TURNED),
    ("<s>The quick", TURNED),
    ("All that", {"until": "\n\n", "max_new_tokens": 12, "repetition_penalty": 1.4}),
    ("The", {"until": "\n\n", "max_new_tokens": 12, "repetition_penalty": 1.4}),
)
FAMILIES = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 16, "n_positions": LENGTH}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 16}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_key_value_heads": 1,
            "num_local_experts": 4,
            "max_position_embeddings": LENGTH,
        },
    ),
}


@pytest.mark.parametrize(
    "family", ["gpt2", "mixtral", pytest.param("bloom", marks=pytest.mark.slow)]
)
def test_answers_are_those_of_the_hf_model(tmp_path, tokenizer, family):
    """Mixtral's tokenizer begins texts with a token; BLOOM reads any length, here as much as is given."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    hf = pytest.importorskip("transformers", reason="transformers is not installed")
    from lm_eval.models.huggingface import HFLM

    folder = str(tmp_path / family)
    config_class, model_class, shape = FAMILIES[family]
    ids = {f"{r}_token_id": tokenizer.token_to_id(t) for r, t in (("bos", "<s>"), ("eos", "</s>"))}
    torch.manual_seed(0)
    config = getattr(hf, config_class)(
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=300,
        initializer_range=0.3,
        pad_token_id=None,
        **ids,
        **shape,
    )
    getattr(hf, model_class)(config).save_pretrained(folder)
    own = tokenizer.__class__.from_str(tokenizer.to_str())
    if family == "mixtral":
        own.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", ids["bos_token_id"])]
        )
    words = {"eos_token": "</s>"} | ({} if family == "gpt2" else {"bos_token": "<s>"})
    hf.PreTrainedTokenizerFast(tokenizer_object=own, **words).save_pretrained(folder)

    limit = {"max_length": LENGTH} if family == "bloom" else {}
    theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1, **limit)
    ours = HarnessModel(folder, batch_size=3, **limit)
    assert ours.max_length == theirs.max_length
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id
    found, wanted = (lm.loglikelihood(SCORED, disable_tqdm=True) for lm in (ours, theirs))
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in wanted], atol=1e-4, rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    found, wanted = (lm.loglikelihood_rolling(ROLLED, disable_tqdm=True) for lm in (ours, theirs))
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-5)
    said = SAID[: 3 if family == "bloom" else None]
    found, wanted = (lm.generate_until(said, disable_tqdm=True) for lm in (ours, theirs))
    assert found == wanted
    assert len(set(found)) >= 3
    assert not any("e" in text or "th" in text for text in found[:3])
    if family != "gpt2":
        assert HarnessModel(folder, max_length=77).max_length == 77
        return
    with pytest.raises(ValueError, match="at most the model's 32 positions"):
        HarnessModel(folder, max_length=77)
    chat = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    of_theirs = hf.AutoTokenizer.from_pretrained(folder, chat_template=chat)
    lm = HarnessModel(ours.model, of_theirs)
    assert lm.apply_chat_template([{"role": "user", "content": "Hi"}]) == "user: Hi "
    assert lm.chat_template(True) == chat
    assert lm.prefix_token_id == theirs.prefix_token_id


@pytest.fixture(scope="module")
def model():
    shape = {"num_layers": 1, "d_model": 16, "num_heads": 2, "max_length": 96}
    config = dataclasses.replace(gpt2(vocab_size=300, **shape), init_std=0.3)
    return jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()


def test_a_packed_model_on_tasks_of_ones_own(tmp_path, capsys, model, tokenizer):
    """By the command, on a folder; and packed, where 8 bits change little."""
    names = write_tasks(tmp_path, functions=6, texts=2)
    save_pretrained(model, tmp_path / "model", tokenizer=tokenizer)
    words = f"--model {tmp_path / 'model'} --tasks {','.join(names)} --include-path {tmp_path}"
    main([*words.split(), "--output", str(tmp_path / "out.json"), "--limit", "6"])
    assert "acc_norm" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(words.replace("functions", "funktions").split())
    assert "got 'funktions'; similar tasks: functions" in capsys.readouterr().err
    found = json.loads((tmp_path / "out.json").read_text())

    # By hand, from the same functions and by this task's own rules.
    rows = [json.loads(line) for line in (tmp_path / "functions.jsonl").read_text().splitlines()]
    prompts = [f"In Python, the function {row['name']} does this:" for row in rows]
    answers = [[f" {choice}" for choice in row["choices"]] for row in rows]
    best = rank_answers(model, tokenizer, prompts, answers, max_length=96).best
    gold = np.array([row["gold"] for row in rows])
    assert found["results"]["functions"]["acc,none"] == pytest.approx((best == gold).mean())
    texts = [json.loads(line) for line in (tmp_path / "docstrings.jsonl").read_text().splitlines()]
    ids = [tokenizer.encode(row["text"]).ids for row in texts]
    start = tokenizer.token_to_id("<|endoftext|>")
    nats = text_log_probs(model, ids, bos_token_id=start, max_length=96).sum()
    size = sum(len(row["text"].encode()) for row in texts)
    assert found["results"]["docstrings"]["byte_perplexity,none"] == pytest.approx(
        np.exp(-nats / size), rel=1e-5
    )

    packed = HarnessModel(quantize_model(model, w8a8()), tmp_path / "model")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(model=packed, tasks=names, task_manager=manager, bootstrap_iters=0)
    near = found["results"]["docstrings"]["byte_perplexity,none"]
    packed_perplexity = results["results"]["docstrings"]["byte_perplexity,none"]
    assert packed_perplexity == pytest.approx(near, rel=0.02)
    assert packed_perplexity != near


def test_equal_questions_are_sampled_apart(model, tokenizer):
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", *[("Is it so?", options)] * 5)
    found = HarnessModel(model, tokenizer, batch_size=3).generate_until(asked, disable_tqdm=True)
    assert len(set(found)) == 5
    again = HarnessModel(model, tokenizer, batch_size=3).generate_until(asked, disable_tqdm=True)
    assert again == found


def test_generation_kwargs(tmp_path, tokenizer):
    codec = codec_of(tokenizer)
    of = lambda **given: sampling_of(given, codec)
    config, until = of(until="\n")
    assert until == ["\n", "<|endoftext|>"]
    assert (config.greedy, config.max_new_tokens, config.stop_token_ids) == (
        True,
        256,
        (codec.eos_token_id,),
    )
    assert of(max_tokens=7, temperature=0.7, do_sample=False)[0].temperature == 0
    assert of(temperature=0.7)[0].top_k == 50
    assert of(temperature=0.7, top_k=3)[0].top_k == 3
    fields = {"eos_token_id": [5, 6], "repetition_penalty": 1.2, "do_sample": True, "top_p": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    config, _ = sampling_of({"max_gen_toks": 4}, codec, folder=tmp_path, stop_token_ids=(9,))
    assert (config.greedy, config.repetition_penalty) == (True, 1.2)
    assert config.stop_token_ids == (5, 6, 9, codec.eos_token_id)
    config, _ = sampling_of({"temperature": 0.5}, codec, folder=tmp_path)
    assert (config.temperature, config.top_p, config.top_k) == (0.5, 0.9, 50)
    for given, said in (
        ({"num_beams": 4}, "num_beams must be 1, got 4"),
        (
            {"temprature": 1.0},
            "must be known options, got temprature=1.0: did you mean 'temperature'",
        ),
        ({"do_sample": True}, "temperature must be above 0 with do_sample=True"),
        ({"max_gen_toks": 0}, "max_gen_toks must be at least 1, got 0"),
        ({"top_p": 2.0, "temperature": 1.0}, "top_p must be .*, got 2.0"),
    ):
        with pytest.raises(ValueError, match=said):
            of(**given)


def test_tokens_that_begin_and_end_texts(tmp_path, tokenizer):
    """What a tokenizer's files name counts; without a name, what config.json numbers; without that, what divides documents."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write = lambda name, **fields: (tmp_path / name).write_text(json.dumps(fields))
    ends = lambda: (codec_of(tmp_path).bos_token_id, codec_of(tmp_path).eos_token_id)
    of = tokenizer.token_to_id
    assert ends() == (of("<|endoftext|>"), of("<|endoftext|>"))
    write("config.json", bos_token_id=7, eos_token_id=[8, 9], n_ctx=64, vocab_size=300)
    assert ends() == (7, 8)
    assert codec_of(tmp_path).max_length == 64
    write("special_tokens_map.json", eos_token={"content": "</s>"})
    assert ends() == (of("</s>"), of("</s>"))
    write("tokenizer_config.json", bos_token="<s>", eos_token=None, added_tokens_decoder={})
    assert ends() == (of("<s>"), None)


def test_errors_say_what_would_do(monkeypatch, tmp_path, capsys, model, tokenizer):
    with pytest.raises(ValueError, match="tokenizer must be given"):
        HarnessModel(model)
    with pytest.raises(FolderError, match="there is no folder"):
        HarnessModel(tmp_path / "none")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        HarnessModel(model, tokenizer, batch_size=0)
    score = ClassHead(name="score", num_classes=1, pool="last")
    with pytest.raises(ValueError, match=r"got heads \['score'\]"):
        HarnessModel(abstract_model(dataclasses.replace(model.config, heads=(score,))), tokenizer)
    block = dataclasses.replace(
        model.config.layers[0],
        feed_forward=MoEConfig(num_experts=2, expert=model.config.layers[0].feed_forward),
    )
    experts = dataclasses.replace(model.config, groups=group_layers([block]))
    with pytest.raises(ValueError, match=r"experts of layer 0 have eval_capacity_factor=1\.0"):
        HarnessModel(abstract_model(experts), tokenizer)

    lm = HarnessModel(model, tokenizer)
    with pytest.raises(ValueError, match="is empty"):
        lm.loglikelihood(requests("loglikelihood", ("Is it so?", "")), disable_tqdm=True)
    with pytest.raises(ValueError, match="adds no token to"):
        lm.loglikelihood(requests("loglikelihood", ("", "<|endoftext|>")), disable_tqdm=True)
    with pytest.raises(ValueError, match="at most max_length=96 tokens, got"):
        lm.loglikelihood(requests("loglikelihood", ("Is", " it so" * 60)), disable_tqdm=True)
    with pytest.raises(ValueError, match=r"max_gen_toks must be below max_length=96.*got 256"):
        lm.generate_until(requests("generate_until", ("Is", {})), disable_tqdm=True)
    with pytest.raises(ValueError, match="tokenizer of transformers"):
        lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    bare = dataclasses.replace(lm.codec, bos_token_id=None)
    monkeypatch.setattr(lm, "codec", bare)
    with pytest.raises(ValueError, match="Pass bos_token_id"):
        lm.loglikelihood(requests("loglikelihood", ("", " yes")), disable_tqdm=True)
    table = jax.tree_util.Partial(lambda table, ids: table[ids], np.zeros((300, 300)))
    with pytest.raises(ValueError, match="generation needs an effscale Transformer"):
        HarnessModel(table, tokenizer).generate_until(SAID, disable_tqdm=True)
    monkeypatch.delenv("EFFSCALE_TRACEBACK", raising=False)
    for words, said in (
        (f"--model {tmp_path}/none --tasks a --include-path {tmp_path}", "there is no folder"),
        (f"--model {tmp_path} --tasks a --include-path {tmp_path}/none", "must be a folder, got"),
    ):
        with pytest.raises(SystemExit):
            main(words.split())
        assert said in capsys.readouterr().err
    monkeypatch.setattr("effscale.interop.harness.model.TemplateLM", object)
    with pytest.raises(ImportError, match="pip install lm_eval"):
        HarnessModel(model, tokenizer)
