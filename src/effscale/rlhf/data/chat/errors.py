"""What goes wrong with chat templates."""


class TemplateError(ValueError):
    """A chat template that is damaged, does what it may not, or refuses the messages it was given."""
