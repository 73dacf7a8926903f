"""Chat with a model in the terminal or the browser. It answers word by word and remembers the conversation.

    python -m effscale.chat --model FOLDER
    python -m effscale.chat --model runs/mine/seed-0/ppo/model --temperature 0.7 --top-p 0.9
    python -m effscale.chat --web --model runs/mine/seed-0/sft/model --beside runs/mine/seed-0/ppo/model

In the terminal, /clear forgets the conversation, /quit (or Ctrl-D) ends it, and Ctrl-C stops an answer. --web opens a
page at http://127.0.0.1:7860 instead, where two models can answer side by side; it needs Gradio. Any folder of a
causal model with a tokenizer works; nothing is downloaded.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Iterable

from effscale.chat.config import PRESETS, Config
from effscale.command.line import messages, parse
from effscale.extras import require

HELP = "/clear forgets the conversation, /quit ends it"


def run(config: Config, lines: Iterable[str], write: Callable[[str], object]) -> None:
    """Run the conversation.

    Args:
        config: Config of the chat.
        lines: The user's input.
        write: Shows text.

    Raises:
        ValueError: No model folder is given, or the model cannot be used for a chat.
    """
    if config.model is None:
        raise ValueError("model must be the folder of a model. Use --model FOLDER")
    from effscale.chat.conversation import Conversation

    talk = Conversation.open(config.model, config)
    write(f"{config.model.name}: {HELP}\n")
    for line in lines:
        words = line.strip()
        if words == "/quit":
            break
        if words == "/clear":
            talk.clear()
            write("(forgotten)\n")
        elif words.startswith("/"):
            write(f"unknown command {words.split()[0]!r}; {HELP}\n")
        elif words:
            _answer(talk.answer(words), write)


def _answer(pieces: Iterable[str], write: Callable[[str], object]) -> None:
    try:
        for piece in pieces:
            write(piece)
    except KeyboardInterrupt:
        write(" ...")
    except ValueError as error:
        write(f"(not answered: {error})")
    write("\n")


def _typed() -> Iterable[str]:
    """Yield lines typed in the terminal, with history and editing if readline is available."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  importing it gives input() a history
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()


def _show(text: str) -> None:
    print(text, end="", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    with messages():
        config = parse(PRESETS, __doc__ or "", argv, name="python -m effscale.chat")
        if config.web:
            require("the page", "gradio")
            from effscale.chat.web import serve

            serve(config)
        else:
            run(config, _typed(), _show)
