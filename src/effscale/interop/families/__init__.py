"""The families, by the ``model_type`` of their ``config.json``."""

from effscale.interop.families.decoders import BLOOM, GPT2, GPTJ, NEOX, OPT
from effscale.interop.families.encoders import BERT, VIT
from effscale.interop.families.experts import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from effscale.interop.families.family import Family
from effscale.interop.families.llama import LLAMA, MISTRAL, QWEN2

# If several can express a model, the first is written.
_EVERY = (
    *(GPT2, OPT, BLOOM, GPTJ, NEOX, LLAMA, MISTRAL, QWEN2, BERT, VIT),
    *(MIXTRAL, QWEN2_MOE, OLMOE, QWEN3_MOE),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _EVERY}

__all__ = [
    "FAMILIES",
]
