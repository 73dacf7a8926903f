"""The ``quantization_config`` of compressed-tensors: which modules are quantized, and to what.

References:
    vLLM project, "compressed-tensors", version 0.20. https://github.com/vllm-project/compressed-tensors
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from effscale.interop.foreign import Fields, shown
from effscale.interop.patterns import matcher
from effscale.interop.tensors import FolderError
from effscale.quant.formats import Format, stored_bits

METHOD = "compressed-tensors"
INT, PACKED, MIXED = "int-quantized", "pack-quantized", "mixed-precision"
WE_HAVE = (
    f"effscale supports the compressed-tensors formats {INT} and {PACKED}: integers of 8, 4 or 2 bits (2 only symmetric) with the "
    "strategies tensor, channel and group, and inputs that are unquantized or quantized dynamically per token or per tensor"
)
INPUT_BITS = (3, 4, 8)
UNKNOWN = ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config")
"""Fields that change what a model computes and are not supported."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The quantization of the weights and inputs of some modules.

    Attributes:
        weights: Format of the weights, with granularity ``channel`` or ``group``.
        activations: Format of the inputs; None leaves them unquantized.
        layout: ``int-quantized`` (codes of 8 bits) or ``pack-quantized`` (words).
    """

    weights: Format
    activations: Format | None
    layout: str

    def fields(self, targets: list[str]) -> dict[str, Any]:
        """Return the scheme as a group of the config."""
        inputs = self.activations
        return {
            "targets": targets,
            "format": self.layout,
            "weights": _described(self.weights, dynamic=False),
            "input_activations": None if inputs is None else _described(inputs, dynamic=True),
        }


def _described(format: Format, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": format.symmetric,
        "strategy": format.granularity,
        "dynamic": dynamic,
        **({"group_size": format.group_size} if format.group_size else {}),
    }


def scheme_for(weights: Format, activations: Format | None) -> Scheme:
    """Return the scheme that represents effscale's formats with the same codes.

    Scales per tensor or block are written per output, and 3 bits as 4.

    Raises:
        ValueError: No such scheme exists.
    """
    if weights.floating or weights.bits == 1:
        raise ValueError(f"compressed-tensors has no format for {weights.describe()}; {WE_HAVE}")
    if activations and (activations.floating or activations.bits not in INPUT_BITS):
        raise ValueError(
            f"compressed-tensors has no format for inputs as {activations.describe()}; {WE_HAVE}"
        )
    grouped = weights.granularity == "group"
    return Scheme(
        Format(
            bits=stored_bits(weights.bits),
            symmetric=weights.symmetric,
            granularity="group" if grouped else "channel",
            group_size=weights.group_size,
            spread="centered",
        ),
        activations,
        INT if weights.bits == 8 and activations is not None else PACKED,
    )


def config_fields(groups: Mapping[Scheme, list[str]]) -> dict[str, Any]:
    """Return the ``quantization_config`` of schemes and the modules that each targets."""
    layouts = {scheme.layout for scheme in groups}
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": layouts.pop() if len(layouts) == 1 else MIXED,
        "ignore": [],
        "config_groups": {
            f"group_{i}": scheme.fields(targets)
            for i, (scheme, targets) in enumerate(groups.items())
        },
    }


def target_of_layers(name: str) -> str:
    r"""Return the target that matches a module of this name in every layer.

    Example:
        >>> target_of_layers("model.layers.3.mlp.up_proj")
        're:model\\.layers\\.\\d+\\.mlp\\.up_proj$'
    """
    parts = [r"\d+" if part.isdigit() else re.escape(part) for part in name.split(".")]
    return "re:" + r"\.".join(parts) + "$"


class CompressedConfig:
    """A parsed ``quantization_config``.

    Raises:
        FolderError: Something in it is not supported; the message lists what is.
    """

    def __init__(self, given: Fields):
        for field in UNKNOWN:
            if given.values.get(field):
                raise FolderError(f"{given.where} has {field}, which is not supported; {WE_HAVE}")
        status = given.text("quantization_status", "compressed")
        if status != "compressed":
            raise FolderError(
                f"{given.where}: quantization_status must be 'compressed', got {shown(status)}"
            )
        overall = given.text("format", None)
        groups = given.block("config_groups")
        self.ignored = _Targets(given.strings("ignore", []))
        self.groups: list[tuple[_Targets, Scheme]] = []
        for name in groups.values:
            group = groups.block(name)
            layout = group.text("format", overall)
            if layout not in (INT, PACKED):
                raise FolderError(
                    f"{group.where} the format {shown(layout)} is not supported; {WE_HAVE}"
                )
            self.groups.append((_Targets(group.strings("targets")), _read_scheme(group, layout)))

    def scheme_of(self, module: str) -> Scheme | None:
        """Return the scheme of a linear module, or None if no scheme targets it. A name takes precedence over a
        pattern, and a pattern over a class.
        """
        if self.ignored.rank(module) is not None:
            return None
        ranked = [(targets.rank(module), scheme) for targets, scheme in self.groups]
        found = [(rank, scheme) for rank, scheme in ranked if rank is not None]
        return min(found, key=lambda pair: pair[0])[1] if found else None


class _Targets:
    """The names, patterns and classes of modules that a scheme targets."""

    def __init__(self, targets: Iterable[str]):
        self.names: set[str] = set()
        self.patterns: list[Callable[[str], bool]] = []
        for target in targets:
            if not target.startswith("re:"):
                self.names.add(target)
                continue
            pattern = target.removeprefix("re:")
            try:
                # As in `re.match`: matches at the beginning, not necessarily to the end.
                self.patterns.append(matcher(f"^(?:{pattern}).*"))
            except ValueError as error:
                raise FolderError(
                    f"quantization_config has the target {shown(target)}: {error}"
                ) from error

    def rank(self, module: str) -> int | None:
        """Return 0 if the module's name is listed, 1 if a pattern matches, 2 if its class is listed, and None
        otherwise.
        """
        if module in self.names:
            return 0
        if any(matches(module) for matches in self.patterns):
            return 1
        return 2 if "Linear" in self.names else None


def _read_scheme(group: Fields, layout: str) -> Scheme:
    if group.values.get("output_activations"):
        raise FolderError(f"{group.where} outputs are quantized, which is not supported; {WE_HAVE}")
    weights, inputs = group.block("weights"), group.block("input_activations", None)
    strategy, size = _strategy(weights)
    bits = weights.whole("num_bits", 8)
    if bits not in (2, 4, 8) or weights.values.get("dynamic", False):
        raise FolderError(
            f"{weights.where} {bits} bits with dynamic={shown(weights.values.get('dynamic'))} are not supported; {WE_HAVE}"
        )
    if strategy not in ("tensor", "channel", "group"):
        raise FolderError(
            f"{weights.where} the strategy {shown(strategy)} is not supported; {WE_HAVE}"
        )
    try:
        format = Format(
            bits=bits,
            symmetric=weights.flag("symmetric", True),
            granularity="group" if strategy == "group" else "channel",
            group_size=size if strategy == "group" else None,
            spread="centered",
        )
        activations = None if inputs is None else _read_inputs(inputs)
    except FolderError:
        raise
    except ValueError as error:
        raise FolderError(f"{weights.where} {error}; {WE_HAVE}") from error
    return Scheme(format, activations, layout)


def _read_inputs(inputs: Fields) -> Format:
    strategy, _ = _strategy(inputs)
    bits, dynamic = inputs.whole("num_bits", 8), inputs.values.get("dynamic", False)
    if strategy not in ("token", "tensor") or dynamic is not True or bits not in INPUT_BITS:
        raise FolderError(
            f"{inputs.where} the strategy {shown(strategy)} with num_bits={bits} and dynamic={shown(dynamic)} is not supported; {WE_HAVE}"
        )
    return Format(
        bits=bits,
        symmetric=inputs.flag("symmetric", True),
        granularity="token" if strategy == "token" else "tensor",
        spread="centered",
    )


def _strategy(given: Fields) -> tuple[str, int | None]:
    """Return the strategy, which may follow only from the group size, and the group size."""
    kind = given.text("type", "int")
    if kind != "int":
        raise FolderError(f"{given.where} the type {shown(kind)} is not supported; {WE_HAVE}")
    size = given.whole("group_size", None, least=-1)
    implied = {None: "tensor", -1: "channel"}.get(size, "group")
    return given.text("strategy", implied), size
