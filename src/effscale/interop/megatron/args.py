"""Convert Megatron-DeepSpeed's training arguments to the config of a GPT with experts, and back."""

import math
from collections.abc import Mapping
from typing import Any

from effscale.interop.families.fields import found
from effscale.interop.families.mixtures import mixtures
from effscale.interop.foreign import Fields, shown
from effscale.interop.tensors import FolderError
from effscale.models import LMHead, TransformerConfig, gpt2
from effscale.moe.layer import MoEConfig
from effscale.moe.layouts import with_experts
from effscale.moe.router import RouterConfig

WHERE = "the args in the checkpoint"
ONLY = {
    "normalization": "layernorm",
    "add_position_embedding": True,
    "use_rotary_position_embeddings": False,
    "add_bias_linear": True,
    "swiglu": False,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "num_experts_switch": None,
}
"""Arguments for which only one value is supported."""

GELUS = {"openai_gelu": "gelu_tanh", "onnx_safe": "gelu", "squared_relu": "relu2"}
"""Arguments that select an activation, in the order in which Megatron checks them."""


def from_args(values: Mapping[str, Any], tensors: int) -> TransformerConfig:
    """Create a config from the arguments of Megatron-DeepSpeed.

    Args:
        values: The arguments, by name.
        tensors: The number of tensors in the checkpoint, an upper bound on the number of layers.

    Raises:
        FolderError: The arguments describe a model that effscale does not support.
    """
    args = Fields(WHERE, values)
    for name, wanted in ONLY.items():
        if values.get(name, wanted) not in (wanted, None):
            raise FolderError(
                f"{WHERE} must have {name}={wanted!r}, the only supported value, got {shown(values[name])}"
            )
    layers, heads = args.whole("num_layers", least=1), args.whole("num_attention_heads", least=1)
    d_model = args.whole("hidden_size", least=1)
    if layers > tensors:
        raise FolderError(
            f"{WHERE} must have num_layers of at most {tensors}, the number of tensors, got {layers}"
        )
    for name, wanted in (("num_key_value_heads", heads), ("kv_channels", d_model // heads)):
        if args.whole(name, wanted) != wanted:
            raise FolderError(f"{WHERE} must have {name}={wanted}, got {values[name]}")
    # Megatron's fused kernel of bias and activation rounds the factor of GELU's tanh like BLOOM.
    fused = args.flag("bias_gelu_fusion", True)
    chosen: Any = next(
        (ours for name, ours in GELUS.items() if values.get(name)),
        "gelu_bloom" if fused else "gelu",
    )
    dense = gpt2(
        num_layers=layers,
        d_model=d_model,
        num_heads=heads,
        vocab_size=args.whole("padded_vocab_size", least=1),
        max_length=args.whole("max_position_embeddings", least=1),
        d_ff=args.whole("ffn_hidden_size", None),
        dropout=args.number("hidden_dropout", 0.1),
        attention_dropout=args.number("attention_dropout", 0.1),
        activation=chosen,
        epsilon=args.number("layernorm_epsilon", 1e-5),
        tied=not args.flag("untie_embeddings_and_output_weights", False),
    )
    every = args.whole("expert_interval", 2, least=1)
    counts = args.wholes("num_experts", [1])
    if len(counts) == 1:
        counts = counts * (layers // every)
    if len(counts) != layers // every:
        raise FolderError(
            f"{WHERE} must have num_experts as one number, or one for each of {layers // every} layers, got {shown(counts)}"
        )
    if max(counts, default=1) <= 1:
        return dense
    return with_experts(
        dense, _mixture(args, dense), [n if n > 1 else 0 for n in counts], every=every
    )


def to_args(config: TransformerConfig) -> dict[str, Any]:
    """Create the arguments of Megatron-DeepSpeed from a config, without checking that they convert back to the same config.

    Raises:
        ValueError: The config has no experts, or parts that Megatron-DeepSpeed does not support.
    """
    first = mixtures(config)[0]
    sizes = [getattr(layer.feed_forward, "num_experts", 1) for layer in config.layers]
    sparse = [number + 1 for number, size in enumerate(sizes) if size > 1]
    every = math.gcd(*sparse)
    expert, router = _expert(first), first.router
    return {
        **{name: value for name, value in ONLY.items() if value is not None},
        "num_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": found(config, "num_heads"),
        "num_key_value_heads": found(config, "num_kv_heads"),
        "kv_channels": config.d_model // found(config, "num_heads"),
        "ffn_hidden_size": expert.d_ff,
        "padded_vocab_size": found(config, "vocab_size"),
        "max_position_embeddings": found(config, "max_length"),
        "hidden_dropout": found(config, "dropout"),
        "attention_dropout": found(config, "attention_dropout"),
        "layernorm_epsilon": found(config, "epsilon"),
        "bias_gelu_fusion": expert.activation == "gelu_bloom",
        **{name: expert.activation == ours for name, ours in GELUS.items() if name != "onnx_safe"},
        "untie_embeddings_and_output_weights": not all(
            head.tied for head in config.heads if isinstance(head, LMHead)
        ),
        "expert_interval": every,
        "num_experts": sizes[every - 1 :: every],
        "topk": router.k,
        "mlp_type": "standard" if first.shared is None else "residual",
        "moe_token_dropping": router.eval_capacity_factor is not None,
        "moe_train_capacity_factor": router.capacity_factor or 1.0,
        "moe_eval_capacity_factor": router.eval_capacity_factor or 1.0,
        "moe_min_capacity": router.min_capacity,
        "moe_loss_coeff": router.balance,
        "moe_top2_2nd_expert_sampling": router.noise == "gumbel_second",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }


def _mixture(args: Fields, dense: TransformerConfig) -> MoEConfig:
    expert: Any = dense.blocks[0].feed_forward
    k, kind = args.whole("topk", 1, least=1), args.text("mlp_type", "standard")
    if kind not in ("standard", "residual"):
        raise FolderError(f"{WHERE} must have mlp_type standard or residual, got {shown(kind)}")
    drops = args.flag("moe_token_dropping", True)
    factor = lambda name: args.number(name, 1.0) if drops else None
    sampled = k == 2 and args.flag("moe_top2_2nd_expert_sampling", True)
    router = RouterConfig(
        k=k,
        capacity_factor=factor("moe_train_capacity_factor"),
        eval_capacity_factor=factor("moe_eval_capacity_factor"),
        min_capacity=args.whole("moe_min_capacity", 4),
        noise="gumbel_second" if sampled else None,
        balance=args.number("moe_loss_coeff", 0.1),
    )
    shared = expert if kind == "residual" else None
    return MoEConfig(num_experts=k, expert=expert, router=router, shared=shared)


def _expert(moe: MoEConfig) -> Any:
    return moe.expert
