"""Parse the blocks of DeepSpeed's ``compression_training``: switches, module groups, strings and numbers."""

from typing import Any, NamedTuple

from effscale.interop.deepspeed.module_names import Names, search
from effscale.interop.deepspeed.settings import Block, check_keys, strings, switch

BLOCK = "compression_training"


class ModuleGroup(NamedTuple):
    """A group of a technique: its place in the configuration, its parameters, and effscale's names of the weights it
    applies to.
    """

    where: str
    params: Block
    related: Any
    names: list[str]


def enabled(block: Block, technique: str) -> bool:
    """Return whether a technique is present and enabled. The default is off, as in DeepSpeed."""
    where = f"{BLOCK}.{technique}"
    if technique not in block:
        return False
    if technique == "layer_reduction":
        check_keys(block[technique], where, optional=block[technique])
        return switch({"enabled": False} | dict(block[technique]), where)
    keys = ("shared_parameters", "different_groups")
    check_keys(block[technique], where, required=keys[:1], optional=keys[1:])
    shared = block[technique]["shared_parameters"]
    check_keys(shared, f"{where}.shared_parameters", optional=shared)
    return switch({"enabled": False} | dict(shared), f"{where}.shared_parameters")


def groups_of(block: Block, technique: str, names: Names, **params: bool) -> list[ModuleGroup]:
    """Return the groups of a technique, each with the weights it applies to.

    Args:
        block: ``compression_training``.
        technique: Name of the technique.
        names: Names of the weights that the technique can apply to.
        **params: Parameters of a group, each with whether it is required.
    """
    where = f"{BLOCK}.{technique}.different_groups"
    given = block[technique].get("different_groups")
    if not given:
        raise ValueError(f"{where} must name at least one group, because {technique} is enabled")
    check_keys(given, where, optional=given)
    groups: list[ModuleGroup] = []
    for name, group in given.items():
        place = f"{where}.{name}"
        check_keys(group, place, required=("params",), optional=("modules", "related_modules"))
        required = [key for key, needed in params.items() if needed]
        check_keys(group["params"], f"{place}.params", required=required, optional=params)
        patterns = strings(group.get("modules", "*"), f"{place}.modules")
        found = {n: None for p in patterns for n in search(p, names, f"{place}.modules")}
        for other in groups:
            if both := [n for n in found if n in other.names]:
                raise ValueError(
                    f"{place}.modules and {other.where}.modules both match {names[both[0]][0]}. Make the patterns disjoint"
                )
        groups.append(
            ModuleGroup(place, group["params"], group.get("related_modules"), list(found))
        )
    return groups
