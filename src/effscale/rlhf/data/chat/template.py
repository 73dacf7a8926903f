"""A tokenizer's own chat template."""

import contextlib
import functools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from effscale.rlhf.data.chat.errors import TemplateError
from effscale.rlhf.data.record import Message, RecordError

MAX_SOURCE = 1 << 20
"""No template is longer, in characters."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    r"""A Jinja template, rendered as ``transformers.apply_chat_template`` does it.

    Templates come with models of others, so they are run in a sandbox: a template that asks for attributes of Python's, loops
    without end or makes a huge text is refused. Needs jinja2 (the extra ``chat``).

    Attributes:
        source: The template.
        special_tokens: What it may write by names such as ``bos_token``.
        values: Further variables that it knows, such as ``{"enable_thinking": False}``.

    Raises:
        TemplateError: When it is first rendered: the template is damaged.

    Example:
        >>> chat_ml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        >>> template = ChatTemplate(source=chat_ml + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
        >>> template.prompt([Message("user", "Hi")])
        '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
        >>> template.answer([Message("user", "Hi")], "Hello")
        'Hello<|im_end|>\n'
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    parses_special_tokens = True
    """Whether names of special tokens in what it gives mean those tokens."""

    def __post_init__(self):
        if not self.source.strip():
            raise TemplateError("the chat template is empty")
        if len(self.source) > MAX_SOURCE:
            raise TemplateError(
                f"the chat template has {len(self.source):,} characters, and none has more than {MAX_SOURCE:,}"
            )

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of messages.

        Args:
            messages: The turns.
            add_generation_prompt: Whether to end where the assistant's next turn begins.

        Raises:
            TemplateError: The template is damaged, refuses the messages, reaches outside its sandbox, or does too much.
            ImportError: jinja2 is not installed.
        """
        from effscale.rlhf.data.chat import sandbox

        turns = [{"role": m.role, "content": m.content} for m in messages]
        with _telling(), sandbox.bounded():
            return self._compiled.render(
                **self.special_tokens,
                **self.values,
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text of a prompt, up to where the response begins."""
        return self.render(messages, add_generation_prompt=True)

    def answer(self, messages: Sequence[Message], response: str) -> str:
        """The text of a response to a prompt, which goes on where the prompt's text ends, with what ends the turn.

        Raises:
            RecordError: The template writes the prompt in another way when there is a response, so that there is no such text.
        """
        before = self.prompt(messages)
        whole = self.render([*messages, Message("assistant", response)])
        if not whole.startswith(before):
            same = next(
                i for i, (a, b) in enumerate(zip(f"{whole}\0", before, strict=False)) if a != b
            )
            raise RecordError(
                "wrong_type",
                f"with a response the chat template writes {whole[same : same + 40]!r} where the prompt has "
                f"{before[same : same + 40]!r}: the prompt has to be the beginning of the whole",
            )
        return whole[len(before) :]

    @functools.cached_property
    def _compiled(self) -> Any:
        from effscale.rlhf.data.chat import sandbox

        with _telling():
            return sandbox.Sandbox().from_string(self.source)


@contextlib.contextmanager
def _telling() -> Generator[None]:
    """Whatever a template makes Python raise becomes one error."""
    import jinja2

    from effscale.rlhf.data.chat.sandbox import SandboxError

    unforeseen = (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
    )
    try:
        yield
    except TemplateError:
        raise
    except SandboxError as error:
        raise TemplateError(
            f"the chat template is refused, as it may not use this: {error}"
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template is damaged: line {error.lineno}: {error.message}"
        ) from error
    except (jinja2.TemplateError, ValueError, *unforeseen) as error:
        raise TemplateError(f"the chat template fails: {type(error).__name__}: {error}") from error
