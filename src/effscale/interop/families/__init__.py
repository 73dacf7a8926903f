"""The families, by the ``model_type`` of their ``config.json``."""

from effscale.interop.families.bert import BERT
from effscale.interop.families.bloom import BLOOM
from effscale.interop.families.family import Family
from effscale.interop.families.gpt2 import GPT2
from effscale.interop.families.gptj import GPTJ
from effscale.interop.families.llama import LLAMA, MISTRAL, QWEN2
from effscale.interop.families.mixtral import MIXTRAL
from effscale.interop.families.neox import NEOX
from effscale.interop.families.olmoe import OLMOE
from effscale.interop.families.opt import OPT
from effscale.interop.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from effscale.interop.families.vit import VIT

# If several can express a model, the first is written.
_EVERY = (
    *(GPT2, OPT, BLOOM, GPTJ, NEOX, LLAMA, MISTRAL, QWEN2, BERT, VIT),
    *(MIXTRAL, QWEN2_MOE, OLMOE, QWEN3_MOE),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _EVERY}

__all__ = ["FAMILIES", "Family"]
