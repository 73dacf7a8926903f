"""Convert the messages of a prompt to one text, with a tokenizer's own Jinja template or a plain format."""

from effscale.rlhf.data.chat.errors import TemplateError
from effscale.rlhf.data.chat.plain import PlainFormat
from effscale.rlhf.data.chat.template import ChatTemplate

__all__ = [
    "ChatTemplate",
    "PlainFormat",
    "TemplateError",
]
