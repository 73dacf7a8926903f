"""Chat templates of tokenizers."""

import contextlib
import functools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from effscale.rlhf.data.chat.errors import TemplateError
from effscale.rlhf.data.record import Message, RecordError

MAX_SOURCE = 1 << 20
"""Maximum length of a template, in characters."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    r"""A Jinja chat template, rendered like ``transformers.apply_chat_template``.

    Templates come from model authors, so they run in a sandbox: a template that accesses Python attributes, loops
    forever or produces a huge text raises an error. Needs jinja2.

    Attributes:
        source: The template.
        special_tokens: Special tokens that it can refer to by names such as ``bos_token``.
        values: Additional variables, such as ``{"enable_thinking": False}``.

    Raises:
        TemplateError: The template is invalid. Raised when it is first rendered.

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
    """Whether names of special tokens in the output represent those tokens."""

    def __post_init__(self):
        if not self.source.strip():
            raise TemplateError("the chat template is empty")
        if len(self.source) > MAX_SOURCE:
            raise TemplateError(
                f"the chat template must have at most {MAX_SOURCE:,} characters, got {len(self.source):,}"
            )

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Render messages to text.

        Args:
            messages: The turns.
            add_generation_prompt: Whether to append the beginning of the assistant's next turn.

        Raises:
            TemplateError: The template is invalid, rejects the messages, reaches outside its sandbox, or does too
                much work.
            ImportError: jinja2 is not installed.
        """
        from effscale.rlhf.data.chat import sandbox

        turns = [{"role": m.role, "content": m.content} for m in messages]
        with _one_error(), sandbox.bounded():
            return self._compiled.render(
                **self.special_tokens,
                **self.values,
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text of a prompt, up to where the response begins."""
        return self.render(messages, add_generation_prompt=True)

    def answer(self, messages: Sequence[Message], response: str) -> str:
        """Return the text of a response, which continues where the prompt's text ends, including the end of the turn.

        Raises:
            RecordError: The template renders the prompt differently when a response follows, so such a text does not
                exist.
        """
        before = self.prompt(messages)
        whole = self.render([*messages, Message("assistant", response)])
        if not whole.startswith(before):
            same = next(
                i for i, (a, b) in enumerate(zip(f"{whole}\0", before, strict=False)) if a != b
            )
            raise RecordError(
                "wrong_type",
                f"the prompt must be the beginning of the text with a response, but there the chat template writes "
                f"{whole[same : same + 40]!r} where the prompt has {before[same : same + 40]!r}",
            )
        return whole[len(before) :]

    @functools.cached_property
    def _compiled(self) -> Any:
        from effscale.rlhf.data.chat import sandbox

        with _one_error():
            return sandbox.Sandbox().from_string(self.source)


@contextlib.contextmanager
def _one_error() -> Generator[None]:
    """Convert everything that a template can raise to one error."""
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
            f"the chat template uses something that is not allowed: {error}"
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template is invalid: line {error.lineno}: {error.message}"
        ) from error
    except (jinja2.TemplateError, ValueError, *unforeseen) as error:
        raise TemplateError(f"the chat template fails: {type(error).__name__}: {error}") from error
