"""The chat in the browser: what its page does, and a real browser where there is one."""

import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from flax import nnx

from effscale.chat.config import Config
from effscale.chat.conversation import Conversation
from effscale.chat.terminal import main
from effscale.data import train_tokenizer
from effscale.generation import SamplingConfig
from effscale.interop import save_pretrained
from effscale.models import Transformer, gpt2
from effscale.rlhf.data import RecordEncoder

pytest.importorskip("gradio", reason="the extra chat is not installed")

from effscale.chat import web


def model(seed, max_length):
    shape = {"num_layers": 1, "d_model": 16, "num_heads": 2, "vocab_size": 300}
    config = gpt2(**shape, max_length=max_length)
    return jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(seed)))()


@pytest.fixture(scope="module")
def talks():
    texts = ["Human: Name a color. Assistant: Blue."] * 9
    encoder = RecordEncoder(tokenizer=train_tokenizer(texts, vocab_size=300))
    sampling = SamplingConfig(
        max_new_tokens=6,
        stop_token_ids=encoder.stop_token_ids,
        pad_token_id=encoder.padding,
        temperature=0.0,
    )
    return {
        name: Conversation(model(seed, 320), encoder, sampling)
        for seed, name in enumerate(("sft", "ppo"))
    }


@pytest.fixture(scope="module")
def built(talks):
    return web.page(talks)


def answer(built, words, held=None, shown=([], [])):
    """The final outputs of a question: the text box, the conversations, and both panes."""
    (function,) = (f.fn for f in built.fns.values() if f.api_name == "answer")
    *_, last = function(words, held, *shown)
    return last


def contents(pane):
    return [turn["content"] for turn in pane]


def test_both_models_answer_as_in_the_terminal(talks, built):
    words, held, *panes = answer(built, "Hi.")
    assert words == ""
    for pane, talk in zip(panes, talks.values(), strict=True):
        assert contents(pane) == ["Hi.", "".join(talk.fresh().answer("Hi."))]
        assert [turn["role"] for turn in pane] == ["user", "assistant"]
        assert talk.messages == []
    assert [len(talk.messages) for talk in held] == [2, 2]


def test_a_tab_remembers_and_knows_nothing_of_another(built):
    _, held, *shown = answer(built, "Hi.")
    again = answer(built, "Hi.", held, shown)[2:]
    assert [len(pane) for pane in again] == [4, 4]
    assert list(answer(built, "Hi.")[2:]) == shown
    # The second answer was given to a longer conversation.
    assert contents(again[0])[3] != contents(shown[0])[1]


def test_nothing_said_is_not_answered(built):
    assert answer(built, " ") == (" ", None, [], [])


def test_too_long_a_question_is_answered_with_the_reason(built):
    pane = answer(built, "color " * 400)[2]
    assert "(not answered: the message has" in contents(pane)[-1]


def _still(read, seconds=2):
    """Whether what is read does not change for a while."""
    before = read()
    time.sleep(seconds)
    return read() == before


@pytest.mark.slow
def test_in_a_browser(talks, tmp_path):
    pytest.importorskip("selenium", reason="selenium is not installed")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("Debian's packages chromium and chromium-driver are not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    for seed, (name, talk) in enumerate(talks.items()):
        save_pretrained(model(seed, 9000), tmp_path / name, tokenizer=talk.encoder.tokenizer)
    command = [*(sys.executable, "-m", "effscale.chat", "--web", "--temperature", "0")]
    command += ["--max-new-tokens", "8000"]
    command += ["--model", str(tmp_path / "sft"), "--beside", str(tmp_path / "ppo"), "--port"]
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))

    def wait_for(found, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := found():
                return value
            time.sleep(0.2)
        raise AssertionError(f"not there after {seconds} s: {window.page_source[-2000:]}")

    bubbles = lambda: window.find_elements(By.CSS_SELECTOR, "[data-testid=bot]")
    said = lambda: [bubble.text for bubble in bubbles()]
    buttons = lambda: {b.text: b for b in window.find_elements(By.TAG_NAME, "button")}
    server = subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        assert line.startswith("the page is at http://127.0.0.1:")
        url = line.split()[4]
        window.get(url)
        box = wait_for(lambda: window.find_elements(By.TAG_NAME, "textarea"))[0]
        box.send_keys("Hi.", Keys.ENTER)
        wait_for(lambda: len(bubbles()) == 2 and all(text.strip() for text in said()))
        first = said()
        wait_for(lambda: said() != first)  # the answers grow,
        buttons()["Stop"].click()
        wait_for(lambda: _still(said))  # and stay as they are, far from their ends
        assert all(0 < len(text) < 4000 for text in said())
        buttons()["Clear"].click()
        wait_for(lambda: not bubbles())
        box.send_keys("And you?", Keys.ENTER)
        wait_for(lambda: len(bubbles()) == 2 and all(text.strip() for text in said()))
        buttons()["Clear"].click()
        wait_for(lambda: not bubbles())
        sent = [json.loads(entry["message"])["message"] for entry in window.get_log("performance")]
        asked = [
            message["params"]["request"]["url"]
            for message in sent
            if message["method"] == "Network.requestWillBeSent"
        ]
        # Of no other computer.
        assert asked
        assert all(one.startswith((url, "data:", "blob:")) for one in asked)
        taken = subprocess.run(
            [*command, url.rstrip("/").rpartition(":")[2]],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert taken.returncode == 2
        assert "Use --port 0 for a free port" in taken.stderr
    finally:
        window.quit()
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)


def test_names_on_the_page(tmp_path):
    paths = [tmp_path / "seed-0" / step / "model" for step in ("sft", "ppo")]
    assert web._labels(paths) == ["sft", "ppo"]
    paths = [tmp_path / run / "ppo" / "model" for run in ("a", "b")]
    assert web._labels(paths) == ["a/ppo", "b/ppo"]
    assert web._labels(paths[:1] * 2)[1].endswith("a/ppo (2)")


def test_bad_input(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"beside must be None without --web, got "):
        Config(model=tmp_path, beside=tmp_path)
    with pytest.raises(ValueError, match=r"port must be from 0 to 65535, got 70000"):
        Config(port=70000)
    with pytest.raises(ValueError, match="talks must have at least one conversation"):
        web.page({})
    with pytest.raises(SystemExit):
        main(["--web"])
    assert "model must be the folder of a model" in capsys.readouterr().err
