"""What the chat can be told."""

import dataclasses
import pathlib
from typing import Any, Literal

from effscale.generation import SamplingConfig
from effscale.models.validation import check, check_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the model answers; what is left out is as its generation_config.json says."""

    model: pathlib.Path | None = None
    """Folder of a causal model with its tokenizer, such as a step of the experiment rlhf leaves."""
    beside: pathlib.Path | None = None
    """Folder of a second model, which answers the same questions beside the first; with --web."""
    web: bool = False
    """A page in the browser in place of the terminal."""
    host: str = "127.0.0.1"
    """Address of the page. Only this computer reaches 127.0.0.1; 0.0.0.0 opens the page to everyone on the network."""
    port: int = 7860
    """Port of the page; 0 takes the first free one from 7860 on."""
    system: str = ""
    """What the model is told before the conversation."""
    max_new_tokens: int = 256
    """Tokens of an answer at most."""
    temperature: float | None = None
    """0 takes the most likely token always."""
    top_k: int | None = None
    """Only so many most likely tokens may follow; 0: all."""
    top_p: float | None = None
    """Only the fewest tokens whose probabilities reach this may follow."""
    repetition_penalty: float | None = None
    """Above 1, words that were there already become less likely."""
    seed: int = 0
    """Decides what is drawn; the same words then get the same answers."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights; by default that of the files."""
    format: Literal["deepspeed_chat", "hh_rlhf"] | None = None
    """A chat format in place of the tokenizer's own template."""

    def __post_init__(self):
        check_finite(self)
        check(self, self.seed >= 0, "seed", "0 or more")
        check(self, 0 <= self.port < 65536, "port", "between 0 and 65535")
        check(self, self.beside is None or self.web, "beside", "left out without --web")
        SamplingConfig(**self.sampling_changes())  # impossible values are refused here

    def sampling_changes(self) -> dict[str, Any]:
        """What is given in place of the model's own settings."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


PRESETS = {"default": Config()}
