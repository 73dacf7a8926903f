"""The standard feed-forward of a block."""

import dataclasses

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from effscale.models.activations import Activation
from effscale.models.context import Context
from effscale.models.layers import Dense
from effscale.models.weights import matmuls
from effscale.options import Options, PositiveInt
from effscale.parallel import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig(Options):
    """The standard feed-forward: two projections around an activation, or three if gated."""

    d_ff: PositiveInt
    """Inner width."""
    activation: Activation = "gelu_tanh"
    """Activation function. The tanh variants of GELU differ only in the rounding of a constant, as published models do."""
    gated: bool = False
    """``down(act(gate(x)) * up(x))`` instead of ``down(act(up(x)))``; with ``silu`` this is SwiGLU."""
    bias: bool = True
    """Whether the projections have biases."""

    def multiplications(self, d_model: int) -> int:
        """Return the number of multiplications in the forward pass of one token."""
        return (3 if self.gated else 2) * d_model * self.d_ff

    @property
    def points(self) -> tuple[str, ...]:
        """The points of the module: the outputs of the first projections and the input of the last."""
        first = ("feed_forward_gate",) if self.gated else ()
        return (*first, "feed_forward_up", "feed_forward_inner")

    def build(self, d_model: int, *, std: float, out_std: float, rngs: "nnx.Rngs") -> "MLP":
        """Build the module; ``std`` and ``out_std`` are the standard deviations of the initial inner and output weights."""
        return MLP(self, d_model, std=std, out_std=out_std, rngs=rngs)


class MLP(nnx.Module):
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` if gated."""

    def __init__(
        self, config: MLPConfig, d_model: int, *, std: float, out_std: float, rngs: nnx.Rngs
    ):
        wide = {"bias": config.bias, "std": std, "axes": ("embed", "mlp"), "rngs": rngs}
        self.up = Dense(d_model, config.d_ff, **wide)
        self.gate = Dense(d_model, config.d_ff, **wide) if config.gated else None
        self.down = Dense(
            config.d_ff, d_model, bias=config.bias, std=out_std, axes=("mlp", "embed"), rngs=rngs
        )
        self.activation = config.activation

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        context: Context,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], dict[str, Array]]:
        """Return the output and a report of the captured points."""
        del key
        if self.gate is None:
            inner = self.up(x, self.activation, point="feed_forward_up")
        else:
            gate, up = matmuls(
                x,
                self.gate.affine(self.activation, point="feed_forward_gate"),
                self.up.affine(point="feed_forward_up"),
            )
            inner = gate * up
        inner = checkpoint_name(constrain(inner, "batch", "seq", "mlp_act"), "feed_forward_inner")
        return self.down(inner), context.captured(feed_forward_inner=inner)
