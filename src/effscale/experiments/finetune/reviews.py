"""The task ``reviews`` of the experiment ``finetune``."""

from effscale.experiments.finetune.config import Config
from effscale.experiments.shared import assets
from effscale.experiments.shared.classifier.data import reviews_data
from effscale.experiments.shared.classifier.problem import Problem
from effscale.interop import load_pretrained, load_tokenizer
from effscale.models import TokenInputs
from effscale.models.validation import check


def prepare_reviews(config: Config) -> Problem:
    """Reads the reviews and their model.

    Args:
        config: What the experiment was told.
    """
    recipe = config.reviews
    folder = config.text_model or assets.minilm_folder()
    data = reviews_data(load_tokenizer(folder), config.max_length, recipe.train, recipe.test)
    model = load_pretrained(folder)
    if not isinstance(model.config.inputs, TokenInputs) or model.config.causal:
        raise ValueError(f"text_model={str(folder)!r} is no BERT, which this experiment needs")
    longest = model.config.max_length or config.max_length
    check(config, config.max_length <= longest, "max_length", f"at most the model's {longest}")
    return Problem(task="reviews", recipe=recipe, data=data, folder=folder, model=model)
