"""Families of transformers with experts; ``effscale.interop`` finds them here by their ``model_type``."""

from effscale.interop.families.family import Family
from effscale.moe.families.mixtral import MIXTRAL
from effscale.moe.families.olmoe import OLMOE
from effscale.moe.families.qwen import QWEN2_MOE, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (MIXTRAL, QWEN2_MOE, OLMOE, QWEN3_MOE)
}
