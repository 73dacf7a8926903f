"""The pretrained model of the experiment ``xtc``."""

import tokenizers

from effscale.experiments.shared import assets
from effscale.experiments.shared.classifier.problem import read_bert
from effscale.experiments.xtc.config import Config
from effscale.interop import load_tokenizer
from effscale.models import Transformer
from effscale.options import check


def read_model(config: Config) -> tuple[Transformer, tokenizers.Tokenizer]:
    """Read the pretrained model, whose heads are not used, and its tokenizer.

    Args:
        config: Config of the experiment.

    Raises:
        ValueError: The model is not a BERT, or has too few layers or positions.
        ImportError: MiniLM is not installed.
    """
    folder = config.text_model or assets.minilm_folder()
    model = read_bert(folder)
    longest = model.config.max_length or config.passage
    check(config, config.passage <= longest, "passage", f"at most the model's {longest}")
    count = model.config.num_layers
    inside = all(0 <= layer < count for layer in config.teacher_layers)
    check(config, inside, "teacher_layers", f"numbers of the model's layers, 0 to {count - 1}")
    return model, load_tokenizer(folder)
