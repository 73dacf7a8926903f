"""The usual feed-forward of a block."""

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from effscale.models.config import MLPConfig
from effscale.models.context import Context
from effscale.models.layers import Dense
from effscale.models.weights import matmuls
from effscale.parallel import constrain


class MLP(nnx.Module):
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` when gated."""

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
        """The output, and a report of what was asked for."""
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
