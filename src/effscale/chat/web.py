"""A conversation in the browser, with one model or with two side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio

from effscale.chat.config import Config
from effscale.chat.conversation import Conversation


def serve(config: Config) -> None:
    """Open the page and return when Ctrl-C ends it.

    Raises:
        ValueError: No model folder is given, or a model cannot be used for a chat.
        OSError: The port is in use.
    """
    if config.model is None:
        raise ValueError("model must be the folder of a model. Use --model FOLDER")
    folders = [config.model] if config.beside is None else [config.model, config.beside]
    talks = {
        label: Conversation.open(folder, config)
        for label, folder in zip(_labels(folders), folders, strict=True)
    }
    built = page(talks)
    start(built, host=config.host, port=config.port)
    print(f"the page is at {built.local_url} (Ctrl-C ends it)", flush=True)
    built.block_thread()


def page(talks: Mapping[str, Conversation]) -> gradio.Blocks:
    """Build the page. Each browser tab has its own conversations.

    Args:
        talks: Conversations by the name that the page shows for the model; every tab starts with empty copies.
    """
    if not talks:
        raise ValueError("talks must have at least one conversation")
    with gradio.Blocks(title="effscale chat", analytics_enabled=False, fill_height=True) as built:
        begun = gradio.State(None)
        with gradio.Row(scale=1):
            # A model's text is shown literally, not as Markdown or HTML.
            panes = [
                gradio.Chatbot(label=name, render_markdown=False, buttons=["copy"], height="75vh")
                for name in talks
            ]
        with gradio.Row():
            words = gradio.Textbox(
                placeholder="Say something", show_label=False, autofocus=True, scale=8
            )
            send = gradio.Button("Send", variant="primary", min_width=80)
            stop = gradio.Button("Stop", min_width=80)
            clear = gradio.Button("Clear", min_width=80)

        def answered(said: str, held: Sequence[Conversation] | None, *shown: list[Any]):
            if not said.strip():
                yield said, held, *shown
                return
            held = held or [talk.fresh() for talk in talks.values()]
            answers = [_answer(talk, said) for talk in held]
            turns = [[*before, _turn("user", said), _turn("assistant", "")] for before in shown]
            for texts in _together(answers):
                for turn, text in zip(turns, texts, strict=True):
                    turn[-1] = _turn("assistant", text)
                yield "", held, *turns

        places = [words, begun, *panes]
        # Gradio streams only generator functions, and a wrapper that checks types hides that `answered` is one.
        streamed = lambda *given: (yield from answered(*given))
        answering = gradio.on(
            [send.click, words.submit],
            streamed,
            inputs=places,
            outputs=places,
            api_name="answer",
        )
        stop.click(None, cancels=answering)
        # Stop the answers before clearing them: the last piece of an answer would bring it back.
        clear.click(None, cancels=answering).then(
            lambda: [None, *([] for _ in talks)], outputs=[begun, *panes], api_name="clear"
        )
    return built


def start(built: gradio.Blocks, *, host: str, port: int) -> None:
    """Serve a page from a background thread. Neither the server nor the page makes requests to other hosts.

    Raises:
        OSError: The port is in use.
    """
    # System fonts, because those of Gradio's default theme are fetched from the network.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        built.queue().launch(
            server_name=host,
            server_port=port or None,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            theme=gradio.themes.Default(**fonts),
        )
    except OSError as error:
        raise OSError(
            f"the page cannot be opened at --host {host} --port {port}: {error}. Use --port 0 for a free port"
        ) from error


def _labels(folders: Sequence[Any]) -> list[str]:
    """Return the shortest path suffixes that distinguish the folders, without the ``model`` of an experiment's run."""
    named = [
        folder.parts[:-1] if folder.name == "model" and len(folder.parts) > 1 else folder.parts
        for folder in folders
    ]
    for length in range(1, max(map(len, named)) + 1):
        labels = ["/".join(parts[-length:]) for parts in named]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{'/'.join(parts)} ({number})" for number, parts in enumerate(named, 1)]


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _answer(talk: Conversation, said: str) -> Iterator[str]:
    """Yield the answer so far, after each piece."""
    text = ""
    try:
        for piece in talk.answer(said):
            text += piece
            yield text
    except ValueError as error:
        yield f"{text} (not answered: {error})".strip()


def _together(answers: Sequence[Iterator[str]]) -> Iterator[list[str]]:
    """Yield the text of every answer so far, after each has advanced by one piece, until all have ended."""
    texts, left = [""] * len(answers), dict(enumerate(answers))
    while left:
        for number, answer in list(left.items()):
            piece = next(answer, None)
            if piece is None:
                del left[number]
            else:
                texts[number] = piece
        yield list(texts)
