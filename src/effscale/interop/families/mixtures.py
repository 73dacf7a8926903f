r"""The common part of the families: read and write mixtures without capacities in ``config.json``.

The load-balancing loss of transformers counts all k choices, so that its value for an even load is k instead of 1, and it
is one number for all layers together. Here it is a mean over choices, and each layer adds a separate loss. So
``router_aux_loss_coef`` is divided over the layers:

$$balance = coef \cdot k / layers$$
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effscale.interop.families.family import Family
from effscale.interop.families.fields import Field, Json, found, our_activation, their_activation
from effscale.interop.families.llama import relative
from effscale.interop.table import Rule, matrix, rows
from effscale.interop.tensors import FolderError, MixedTensors, TensorInfo
from effscale.models import MLPConfig, TransformerConfig, llama
from effscale.models.grouping import group_layers
from effscale.moe.layer import MoEConfig
from effscale.moe.router import RouterConfig
from effscale.parallel import Exchange

QK_NORMS = (
    Rule("layers.{}.self_attn.q_norm.weight", "attention.query_norm.scale"),
    Rule("layers.{}.self_attn.k_norm.weight", "attention.key_norm.scale"),
)
PROJECTIONS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def gated(theirs: str, ours: str, names: Mapping[str, str] = PROJECTIONS) -> tuple[Rule, ...]:
    """Return the rows of a gated MLP without biases, from the names of its layers to effscale's."""
    each = (matrix(f"{theirs}.{name}", f"{ours}.{part}") for name, part in names.items())
    return rows(*each)


EXPERTS = rows(
    matrix("layers.{}.mlp.gate", "feed_forward.router.logits"),
    gated("layers.{}.mlp.experts.{}", "feed_forward.experts"),
)
"""The table rows of the experts of OLMoE and the Qwen families."""


def mixture(class_name: str, **options: Any) -> Family:
    """Return a family with experts and the names of Llama's tensors, from the fields of ``Family`` that differ."""
    usual: dict[str, Any] = {
        "make": llama_of_experts,
        "feed_forwards": (MLPConfig, MoEConfig),
        "plain": plain,
        "split": lambda tensors: Split(tensors, gate="gate_proj", up="up_proj", down="down_proj"),
    }
    return relative(class_name, **(usual | options))


def llama_of_experts(
    *,
    num_experts: int,
    k: int,
    aux_loss: float,
    normalized: bool = True,
    expert_d_ff: int | None = None,
    sparse: Sequence[bool] | None = None,
    shared_d_ff: int | None = None,
    **dense: Any,
) -> TransformerConfig:
    """Return the config of a Llama with experts in its layers, routed as in transformers, without dropping.

    Args:
        num_experts: The number of experts in a layer.
        k: The number of experts per token.
        aux_loss: The coefficient of the load-balancing loss, as transformers defines it.
        normalized: Whether the weights of a token's experts sum to 1.
        expert_d_ff: The inner width of an expert; None means that of a layer without experts.
        sparse: The layers that have experts; None means all.
        shared_d_ff: The inner width of an additional expert for every token, multiplied by a gate; None means none.
        **dense: Arguments of ``effscale.models.llama``.
    """
    config = llama(**dense)
    layers = config.num_layers if sparse is None else sum(sparse)
    if not layers:
        return config
    mlp: Any = config.blocks[0].feed_forward
    expert = mlp if expert_d_ff is None else dataclasses.replace(mlp, d_ff=expert_d_ff)
    shared = None if shared_d_ff is None else dataclasses.replace(mlp, d_ff=shared_d_ff)
    router = RouterConfig(
        k=k,
        capacity_factor=None,
        eval_capacity_factor=None,
        priority="token",
        normalize="chosen" if normalized else "none",
        balance=_balance(aux_loss, k, layers),
        balance_choices="all",
    )
    mix = "weighted" if shared is None else "gated"
    moe = MoEConfig(num_experts=num_experts, expert=expert, router=router, shared=shared, mix=mix)
    if sparse is None:
        groups = _each_block(config, lambda block: dataclasses.replace(block, feed_forward=moe))
        return dataclasses.replace(config, groups=groups)
    of = {block: dataclasses.replace(block, feed_forward=moe) for block in config.blocks}
    blocks = [of[b] if has else b for b, has in zip(config.layers, sparse, strict=True)]
    return dataclasses.replace(config, groups=group_layers(blocks))


def mixtures(config: TransformerConfig) -> list[MoEConfig]:
    """Return the mixtures of the layers that have experts.

    Raises:
        ValueError: No layer has experts, or the experts are not MLPs.
    """
    found = [p for p in (b.feed_forward for b in config.layers) if isinstance(p, MoEConfig)]
    if not found:
        raise ValueError("the config has no experts")
    if not all(isinstance(moe.expert, MLPConfig) for moe in found):
        raise ValueError("the experts of the config must be MLPs")
    return found


def plain(config: TransformerConfig) -> TransformerConfig:
    """Return the config without options that only matter in training or only select how experts are computed."""

    def of(block: Any) -> Any:
        moe = block.feed_forward
        if not isinstance(moe, MoEConfig):
            return block
        given, defaults = moe.router, RouterConfig()
        normalize = given.normalize or ("none" if given.k == 1 else "kept")
        if normalize == "kept" and given.eval_capacity_factor is None:
            normalize = "chosen"  # all are kept
        router = dataclasses.replace(
            given,
            capacity_factor=None,
            min_capacity=defaults.min_capacity,
            priority="token",
            normalize=normalize,
            noise=None,
            balance=0.0,
            balance_choices="all",
            z_loss=0.0,
        )
        mix = "weighted" if moe.shared is None else moe.mix
        moe = dataclasses.replace(
            moe, router=router, mix=mix, dispatch=None, groups=None, exchange=Exchange()
        )
        return dataclasses.replace(block, feed_forward=moe)

    return dataclasses.replace(config, groups=_each_block(config, of))


def counts(experts: str, num: int, k: int, coefficient: float) -> tuple[Field, ...]:
    """Return the fields of the numbers of experts and of the loss, with their defaults."""
    return (
        of_experts(experts, num, "num_experts", lambda moe: moe.num_experts),
        of_experts("num_experts_per_tok", k, "k", lambda moe: moe.router.k),
        Field(
            "router_aux_loss_coef",
            coefficient,
            "aux_loss",
            write=lambda config: _aux_loss(config) if has_experts(config) else coefficient,
        ),
    )


def other_count(fields: Json, name: str) -> dict[str, int]:
    """Return the number of experts, if the config has it under its other name."""
    return {} if fields[name] is None else {"num_experts": fields[name]}


def of_experts(name: str, default: Any, argument: str, value_of: Callable[[Any], Any]) -> Field:
    """Return a field of the layers with experts; a model in which all layers are dense has its default."""
    write = lambda config: value_of(mixtures(config)[0]) if has_experts(config) else default
    return Field(name, default, argument, write=write)


def expert_activation() -> Field:
    """Return the field for the activation, which layers with and without experts share."""

    def write(config: TransformerConfig) -> str:
        experts: Any = mixtures(config)[0].expert if has_experts(config) else None
        return their_activation(
            found(config, "activation") if experts is None else experts.activation
        )

    return Field("hidden_act", "silu", "activation", read=our_activation, write=write)


def expert_width(name: str, default: int, argument: str) -> Field:
    """Return the field for the inner width of an expert."""
    return of_experts(name, default, argument, lambda moe: moe.expert.d_ff)


def normalized(moe: MoEConfig) -> bool:
    """Return whether the weights of a token's experts sum to 1."""
    router = moe.router
    return router.normalize in ("chosen", "kept") or (router.normalize is None and router.k > 1)


def has_experts(config: TransformerConfig) -> bool:
    """Return whether any layer has experts."""
    return any(isinstance(layer.feed_forward, MoEConfig) for layer in config.layers)


def _aux_loss(config: TransformerConfig) -> float:
    """Return the coefficient as transformers defines it: of the numbers that round to ours, the one with the fewest digits."""
    found = mixtures(config)
    k, balance, layers = found[0].router.k, found[0].router.balance, len(found)
    whole = balance * layers / k
    shorter = (float(f"{whole:.{digits}g}") for digits in range(6, 18))
    return next((c for c in shorter if _balance(c, k, layers) == balance), whole)


def _balance(aux_loss: float, k: int, layers: int) -> float:
    return aux_loss * k / layers


def _each_block(config: TransformerConfig, change: Callable[[Any], Any]) -> tuple[Any, ...]:
    return tuple(
        dataclasses.replace(group, blocks=tuple(map(change, group.blocks)))
        for group in config.groups
    )


FUSED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")


class Split:
    """Tensors in which ``experts.gate_up_proj`` ``[E, 2 f, d]`` and ``experts.down_proj`` ``[E, d, f]`` appear as 3 E matrices.

    Args:
        tensors: The tensors; if none of them is fused, they are unchanged.
        gate: The name of an expert's gate.
        up: The name of the layer that the gate multiplies.
        down: The name of the second layer.

    Raises:
        FolderError: An expert also exists separately.
    """

    def __init__(self, tensors: MixedTensors, *, gate: str, up: str, down: str):
        self._tensors = tensors
        self._parts: dict[str, tuple[str, int, slice]] = {}
        self._last: tuple[str, Any] = ("", None)
        infos: dict[str, TensorInfo] = {}
        for name, info in tensors.infos.items():
            match = FUSED.fullmatch(name)
            whole = (
                match is None or len(info.shape) != 3 or 0 in info.shape or info.form is not None
            )
            if whole or (match[2] == "gate_up_proj" and info.shape[1] % 2):
                infos[name] = info
                continue
            num, rows, width = info.shape
            parts = {down: slice(0, rows)}
            if match[2] == "gate_up_proj":
                parts = {gate: slice(0, rows // 2), up: slice(rows // 2, rows)}
            for part, where in parts.items():
                for expert in range(num):
                    own = f"{match[1]}.{expert}.{part}.weight"
                    if own in tensors.infos:
                        raise FolderError(
                            f"{name!r} contains {own!r}, which also exists separately"
                        )
                    infos[own] = TensorInfo((where.stop - where.start, width), info.dtype)
                    self._parts[own] = (name, expert, where)
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str) -> Any:
        """Read one tensor; the fused tensor that contains it stays in memory until another is read."""
        if name not in self._parts:
            return self._tensors.read(name)
        fused, expert, where = self._parts[name]
        if self._last[0] != fused:
            self._last = (fused, self._tensors.read(fused))
        return self._last[1][expert, where]
