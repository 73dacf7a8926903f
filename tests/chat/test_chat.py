"""The chat in the terminal: what it remembers, forgets and refuses."""

import io
import sys

import jax
import pytest
from flax import nnx

from effscale.chat.config import Config
from effscale.chat.conversation import Conversation
from effscale.chat.terminal import main, run
from effscale.data import train_tokenizer
from effscale.generation import SamplingConfig, generate
from effscale.interop import save_pretrained
from effscale.models import Transformer, gpt2
from effscale.rlhf.data import Message, RecordEncoder

LENGTH, NEW = 72, 6


@pytest.fixture(scope="module")
def made():
    tokenizer = train_tokenizer(["Human: Name a color. Assistant: Blue."] * 9, vocab_size=300)
    config = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=300, max_length=LENGTH)
    model = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    return model, RecordEncoder(tokenizer=tokenizer)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "tiny"
    save_pretrained(made[0], place, tokenizer=made[1].tokenizer)
    return place


def conversation(made, temperature=1.0, **options):
    model, encoder = made
    stops = {"stop_token_ids": encoder.stop_token_ids, "pad_token_id": encoder.padding}
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=temperature, **stops)
    return Conversation(model, encoder, sampling, **options)


def test_it_answers_what_generate_does_and_remembers(made):
    model, encoder = made
    talk = conversation(made, temperature=0.0, system="Be brief.")
    first = "".join(talk.answer("Hi."))
    system = Message("system", "Be brief.")
    prompt = encoder.prompt([system, Message("user", "Hi.")])
    out = generate(model, [prompt], talk.sampling)
    new = out.tokens[0, len(prompt) : len(prompt) + int(out.num_new[0])].tolist()
    # The stop string of a plain format may end an answer earlier.
    assert encoder.tokenizer.decode(new).startswith(first)
    assert [m.role for m in talk.messages] == ["user", "assistant"]
    list(talk.answer("More."))
    assert [m.content for m in talk.messages[::2]] == ["Hi.", "More."]
    talk.clear()
    assert talk.messages == []


def test_the_same_seed_says_the_same(made):
    said = [["".join(conversation(made, seed=seed).answer("Hi."))] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_the_oldest_turns_make_room(made):
    talk = conversation(made)
    for number in range(6):
        list(talk.answer(f"Name the color number {number}."))
    assert talk.messages[-2].content == "Name the color number 5."
    assert talk.messages[0].role == "user"
    assert len(talk.messages) < 12
    with pytest.raises(ValueError, match=r"the message has \d+ tokens, but there is room for 66"):
        list(talk.answer("color " * 90))
    talk = conversation(made, max_prompt_tokens=20)
    with pytest.raises(ValueError, match=r"but there is room for 20: max_prompt_tokens"):
        list(talk.answer("Name the color number 1000000."))


def test_bytes_that_are_no_text_are_read(folder, monkeypatch, capsys):
    typed = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n/quit\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    main(["--model", str(folder), "--max-new-tokens", "2"])
    assert "not answered" not in capsys.readouterr().out


def test_commands(folder):
    shown = []
    config = Config(model=folder, max_new_tokens=4, temperature=0.0)
    run(config, ["Hi.", "", "/what", "/clear", "color " * 99, "/quit", "never"], shown.append)
    text = "".join(shown)
    assert text.startswith("tiny: /clear forgets")
    assert "unknown command '/what'" in text
    assert "(forgotten)" in text
    assert "(not answered: the message has" in text


def test_bad_input(folder, capsys):
    for argv, message in (
        ([], "model must be the folder of a model. Use --model FOLDER"),
        (["--model", str(folder / "nowhere")], "nowhere"),
        (["--model", str(folder), "--max-new-tokens", "0"], "must be at least 1"),
        (
            ["--model", str(folder), "--max-new-tokens", "72"],
            "max_new_tokens must be less than the model's",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
