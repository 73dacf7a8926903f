"""Errors of chat templates."""


class TemplateError(ValueError):
    """A chat template is invalid, does something that is not allowed, or rejects the messages it was given."""
