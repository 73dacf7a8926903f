"""The families, by the ``model_type`` of their ``config.json``."""

import importlib
from collections.abc import Iterator, Mapping

from effscale.interop.families.bert import BERT
from effscale.interop.families.bloom import BLOOM
from effscale.interop.families.family import Family
from effscale.interop.families.gpt2 import GPT2
from effscale.interop.families.gptj import GPTJ
from effscale.interop.families.llama import LLAMA
from effscale.interop.families.mistral import MISTRAL
from effscale.interop.families.neox import NEOX
from effscale.interop.families.opt import OPT
from effscale.interop.families.qwen2 import QWEN2
from effscale.interop.families.vit import VIT

HERE = (GPT2, OPT, BLOOM, GPTJ, NEOX, LLAMA, MISTRAL, QWEN2, BERT, VIT)
# Their parts come from techniques, which import this package, so these modules are imported only when needed.
EXPERTS = ("mixtral", "qwen2_moe", "olmoe", "qwen3_moe")
ELSEWHERE = dict.fromkeys(EXPERTS, "effscale.moe.families")


class Families(Mapping[str, Family]):
    """All families, by ``model_type``; those of techniques are imported when they are looked up."""

    def __init__(self) -> None:
        self._found = {family.model_type: family for family in HERE}

    def __getitem__(self, model_type: str) -> Family:
        if model_type not in self._found and model_type in ELSEWHERE:
            module = importlib.import_module(ELSEWHERE[model_type])
            self._found |= module.FAMILIES
        return self._found[model_type]

    def __contains__(self, model_type: object) -> bool:
        return model_type in self._found or model_type in ELSEWHERE

    def __iter__(self) -> Iterator[str]:
        return iter((*(family.model_type for family in HERE), *ELSEWHERE))

    def __len__(self) -> int:
        return len(HERE) + len(ELSEWHERE)


FAMILIES = Families()

__all__ = ["FAMILIES", "Family"]
