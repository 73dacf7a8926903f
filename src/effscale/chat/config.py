"""Config of the chat."""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

from effscale.generation import SamplingConfig
from effscale.options import Bounds, NonNegativeInt, Options, PositiveInt, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Options of the chat; sampling options that are not set come from the model's generation_config.json."""

    model: pathlib.Path | None = None
    """Folder of a causal model with its tokenizer, such as one that a step of the experiment rlhf saved."""
    beside: pathlib.Path | None = None
    """Folder of a second model that answers the same questions next to the first; needs --web."""
    web: bool = False
    """Open a web page instead of chatting in the terminal."""
    host: str = "127.0.0.1"
    """Address of the page. 127.0.0.1 is only reachable from this computer; 0.0.0.0 opens the page to everyone on the network."""
    port: Annotated[int, Bounds(at_least=0, at_most=65535)] = 7860
    """Port of the page; 0 uses the first free port from 7860."""
    system: str = ""
    """System message before the conversation."""
    max_prompt_tokens: PositiveInt = 2048
    """Maximum number of tokens that the model reads before an answer. The oldest turns are left out, and a longer message is refused: the time to the first word grows with this number."""
    max_new_tokens: int = 256
    """Maximum number of tokens per answer."""
    temperature: float | None = None
    """Sampling temperature; 0 always picks the most likely token."""
    top_k: int | None = None
    """Sample only from this number of most likely tokens; 0 means all."""
    top_p: float | None = None
    """Sample only from the smallest set of tokens whose probabilities sum to this value."""
    repetition_penalty: float | None = None
    """Values above 1 make tokens that already occurred less likely."""
    seed: NonNegativeInt = 0
    """Random seed; the same input gets the same answers."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the weights; the default is that of the files."""
    format: Literal["deepspeed_chat", "hh_rlhf"] | None = None
    """A chat format to use instead of the tokenizer's template."""

    def __post_init__(self):
        super().__post_init__()
        check(self, self.beside is None or self.web, "beside", "None without --web")
        SamplingConfig(**self.sampling_changes())  # raises for invalid values

    def sampling_changes(self) -> dict[str, Any]:
        """Return the options that replace the model's settings."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


PRESETS = {"default": Config()}
