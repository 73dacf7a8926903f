"""The chat in the browser: through its API, and with a real browser where there is one."""

import gc
import shutil
import socket
import time
from urllib.request import urlopen

import jax
import pytest
from flax import nnx

from effscale.data import train_tokenizer
from effscale.experiments.chat import Config, main
from effscale.experiments.chat.conversation import Conversation
from effscale.generation import SamplingConfig
from effscale.interop import save_pretrained
from effscale.models import Transformer, gpt2
from effscale.rlhf.data import RecordEncoder

pytest.importorskip("gradio", reason="the extra chat is not installed")

from effscale.experiments.chat import web

# Gradio and its client leave sockets and event loops to the garbage collector, and use what pandas has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def collected():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def talks():
    texts = ["Human: Name a colour. Assistant: Blue."] * 9
    encoder = RecordEncoder(tokenizer=train_tokenizer(texts, vocab_size=300))
    config = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=300, max_length=320)
    sampling = SamplingConfig(
        max_new_tokens=6, stop_ids=encoder.stop_ids, pad_id=encoder.padding, temperature=0.0
    )
    make = lambda seed: jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(seed)))()
    return {
        name: Conversation(make(seed), encoder, sampling)
        for seed, name in enumerate(("sft", "ppo"))
    }


@pytest.fixture(scope="module")
def served(talks):
    built = web.page(talks)
    web.start(built, host="127.0.0.1", port=0)
    yield built
    built.close()


def client(served):
    from gradio_client import Client

    return Client(served.local_url, verbose=False, analytics_enabled=False)


def contents(pane):
    """What was said: the client gives a turn's content as text, or as parts."""
    parts = [turn["content"] for turn in pane]
    return [p if isinstance(p, str) else "".join(x["text"] for x in p) for p in parts]


def test_both_models_answer_as_in_the_terminal(talks, served):
    words, *panes = client(served).predict("Hi.", [], [], api_name="/answer")
    assert words == ""
    for pane, talk in zip(panes, talks.values(), strict=True):
        assert contents(pane) == ["Hi.", "".join(talk.anew().answer("Hi."))]
        assert talk.messages == []


def test_a_tab_remembers_and_knows_nothing_of_another(served):
    tab, other = client(served), client(served)
    shown = tab.predict("Hi.", [], [], api_name="/answer")[1:]
    again = tab.predict("Hi.", *shown, api_name="/answer")[1:]
    assert len(again[0]) == 4
    assert other.predict("Hi.", [], [], api_name="/answer")[1] == shown[0]
    # The second answer was given to a longer conversation.
    assert contents(again[0])[3] != contents(shown[0])[1]


def test_too_long_a_question_is_answered_with_the_reason(served):
    panes = client(served).predict("colour " * 400, [], [], api_name="/answer")[1:]
    assert "(not answered: that is" in contents(panes[0])[-1]


def test_it_speaks_only_on_this_computer_and_of_no_other(served):
    assert served.local_url.startswith("http://127.0.0.1:")
    with urlopen(served.local_url) as response:
        text = response.read().decode()
    assert "fonts.googleapis" not in text
    assert not served.share


@pytest.mark.slow
def test_in_a_browser(served):
    pytest.importorskip("selenium", reason="selenium is not installed")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("Debian's packages chromium and chromium-driver are not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(option)
    window = webdriver.Chrome(options=options, service=Service(driver))

    def wait_for(found, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := found():
                return value
            time.sleep(0.2)
        raise AssertionError(f"not there after {seconds} s: {window.page_source[-2000:]}")

    bubbles = lambda: window.find_elements(By.CSS_SELECTOR, "[data-testid=bot]")
    try:
        window.get(served.local_url)
        box = wait_for(lambda: window.find_elements(By.TAG_NAME, "textarea"))[0]
        box.send_keys("Hi.", Keys.ENTER)
        wait_for(lambda: len(bubbles()) == 2 and all(b.text.strip() for b in bubbles()))
        clear = [b for b in window.find_elements(By.TAG_NAME, "button") if b.text == "Clear"]
        clear[0].click()
        wait_for(lambda: not bubbles())
    finally:
        window.quit()


def test_names_on_the_page(tmp_path):
    paths = [tmp_path / "seed-0" / step / "model" for step in ("sft", "ppo")]
    assert web._labels(paths) == ["sft", "ppo"]
    paths = [tmp_path / run / "ppo" / "model" for run in ("a", "b")]
    assert web._labels(paths) == ["a/ppo", "b/ppo"]
    assert web._labels(paths[:1] * 2)[1].endswith("a/ppo (2)")


def test_bad_input(talks, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"beside=.* must be left out without --web"):
        Config(model=tmp_path, beside=tmp_path)
    with pytest.raises(ValueError, match="port=70000: must be between 0 and 65535"):
        Config(port=70000)
    with pytest.raises(ValueError, match="talks has no conversation"):
        web.page({})
    with pytest.raises(SystemExit):
        main(["--web"])
    assert "give the folder of a model" in capsys.readouterr().err
    talk = talks["sft"]
    save_pretrained(talk.model, tmp_path / "m", tokenizer=talk.encoder.tokenizer)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit):
            main(["--web", "--model", str(tmp_path / "m"), "--port", str(port)])
    assert f"--port {port}: " in capsys.readouterr().err
