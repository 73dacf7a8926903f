"""Families of transformers that have experts; :mod:`effscale.interop` finds them here by their ``model_type``."""

from effscale.interop.families.family import Family
from effscale.moe.families.mixtral import MIXTRAL

FAMILIES: dict[str, Family] = {family.model_type: family for family in (MIXTRAL,)}
