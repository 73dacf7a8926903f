"""Mixtures of experts at the paper's largest size, for ahead-of-time compilation for 512 chips.

1.3B+MoE-128 (52 billion parameters) and 1.3B+PR-MoE-64/128 (31 billion), with the settings of DeepSpeed's scripts: 24
layers, width 2,048, 512 rows of 2,048 tokens, capacity factor 1. The bytes that all-to-alls send in a step are
compared with a formula. Compilation takes long, so ``make aot`` does not include them:

    python -m kernels_pallas.aot --targets v5p-512 --programs benchmarks.aot.moe
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effscale.models import MLPConfig, Transformer, TransformerConfig, gpt2
from effscale.moe import MoEConfig, RouterConfig, expert_capacity, with_experts
from effscale.optim import Workers, onebit_adam
from effscale.parallel import Exchange, MeshConfig, collectives, per_worker
from effscale.parallel.placement import lower_step
from effscale.training import (
    AdamWConfig,
    Clip,
    ScheduleConfig,
    create_train_state,
    make_train_step,
    next_token_loss,
)
from kernels_pallas.aot import Program

ROWS, LENGTH, D_MODEL, VOCAB = 512, 2048, 2048, 50257
STEPS = 572_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A training step on a mesh."""

    name: str
    experts: tuple[int, ...]
    """Number of experts in every second layer."""
    mesh: MeshConfig
    residual: bool = False
    exchange: Exchange = Exchange()
    onebit: bool = False
    """Use 1-bit Adam between the replicas instead of AdamW."""

    def model(self) -> TransformerConfig:
        """Return the model, which computes in bfloat16 and recomputes its layers in the backward pass."""
        dense = gpt2(
            num_layers=24,
            d_model=D_MODEL,
            num_heads=16,
            vocab_size=VOCAB,
            max_length=LENGTH,
        )
        dense = dataclasses.replace(dense, dtype="bfloat16", remat="full", init_std=0.014)
        expert = dense.blocks[0].feed_forward
        assert isinstance(expert, MLPConfig)
        moe = MoEConfig(
            num_experts=self.experts[0],
            expert=expert,
            router=RouterConfig(),
            shared=expert if self.residual else None,
            exchange=self.exchange,
        )
        return with_experts(dense, moe, self.experts)

    def lower(self, devices: Sequence[Any]) -> jax.stages.Lowered:
        """Lower the donated step for these devices, with one row per device."""
        rate = ScheduleConfig(peak=1.2e-4, warmup=358, total=STEPS, final=1e-6).build()
        clip = Clip(1.0)
        if self.onebit:
            workers = Workers("data")
            optimizer = onebit_adam(rate, freeze_step=STEPS // 5, clip=clip, workers=workers)
            plain = make_train_step(next_token_loss, optimizer, axis_name="data")
            step: Callable[..., Any] = per_worker(plain)
        else:
            optimizer = AdamWConfig(b2=0.95, weight_decay=0.1).build(rate)
            step = make_train_step(next_token_loss, optimizer, clip=clip)
        model = self.model()
        create = lambda: create_train_state(
            Transformer(model, rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0)
        )
        names = ("input_ids", "labels", "segment_ids", "positions")
        batch = dict.fromkeys(names, jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32))
        return lower_step(step, create, batch, self.mesh.build(devices))

    def formula(self, devices: int) -> float:
        r"""Return the bytes that a device sends in all-to-alls in one step.

        For each layer, there are two exchanges of $(p - 1) / p \cdot E C M$ values forward, both again when layers
        are recomputed (the gradient of a token's weights needs the output of its experts), and the same number
        backward.
        """
        expert = self.mesh.expert
        tokens = ROWS * LENGTH // devices
        sent = 0.0
        for count in self.experts:
            numbers = count * expert_capacity(tokens, count, 1.0) * D_MODEL
            near = self.exchange.host_devices or 1
            shares = [near, expert // near] if near > 1 else [expert]
            sent += sum((p - 1) / p for p in shares) * numbers
        return 6 * 2 * sent  # six exchanges of two bytes per value

    def report(self, text: str) -> str:
        """Describe what its all-to-alls send; raises if it differs from the formula."""
        found = [c for c in collectives(text) if c.kind == "all-to-all" and "bf16" in c.dtypes]
        sent = sum(c.times * c.sent for c in found)
        times = sum(c.times for c in found)
        devices = math.prod(self.mesh.sizes(512))
        expected = self.formula(devices)
        if not math.isclose(sent, expected, rel_tol=1e-3):
            raise ValueError(
                f"{times} all-to-alls send {sent / 1e6:,.1f} MB per device, but the formula predicts {expected / 1e6:,.1f}"
            )
        return f"{times} all-to-alls, {sent / 1e6:,.1f} MB per device"


CASES = (
    Case(name="1.3B+MoE-128", experts=(128,) * 12, mesh=MeshConfig(data=4, expert=128)),
    Case(
        name="1.3B+MoE-128, hierarchical",
        experts=(128,) * 12,
        mesh=MeshConfig(data=4, expert=128),
        exchange=Exchange(host_devices=4),
    ),
    Case(
        name="1.3B+PR-MoE-64/128",
        experts=(64,) * 10 + (128,) * 2,
        mesh=MeshConfig(data=8, expert=64),
        residual=True,
    ),
    Case(
        name="1.3B+MoE-128, 1-bit Adam between 4 replicas",
        experts=(128,) * 12,
        mesh=MeshConfig(data=4, expert=128),
        onebit=True,
    ),
)


def programs() -> list[Program]:
    """Return each case for a v5p with 512 chips."""
    return [
        Program(
            name=case.name,
            lower=functools.partial(Case.lower, case),
            targets=("v5p-512",),
            report=functools.partial(Case.report, case),
        )
        for case in CASES
    ]
