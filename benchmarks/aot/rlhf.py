"""PPO at the sizes of DeepSpeed-Chat, for ahead-of-time compilation.

These are the presets of the experiment ``rlhf`` that are too large for most machines: OPT-1.3B on one H100, BLOOM-7B1
on 8 chips, OPT-66B on 64 and BLOOM-176B on 512, each with a critic of some hundred million parameters. Each phase of
an iteration is a separate program, so the memory needed is that of one phase. Compiling all takes an hour on one
core, so ``make aot`` does not include them:

    python -m kernels_pallas.aot --targets h100 v5p v5p-64 v5p-512 --programs benchmarks.aot.rlhf
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from effscale.experiments import rlhf
from effscale.generation import SamplingConfig, decode
from effscale.models import (
    ClassHead,
    Transformer,
    TransformerConfig,
    add_lora,
    bloom,
    is_adapter,
    merge_lora,
    opt,
)
from effscale.parallel import use_rules
from effscale.parallel.placement import lower_step, placed, placed_rows
from effscale.rlhf import RolloutConfig, actor_loss, critic_loss, response_log_probs
from effscale.rlhf.experience import Experience
from effscale.rlhf.rollout import rollout_model
from effscale.training import AdamWConfig, Clip, create_train_state, make_train_step
from kernels_pallas.aot import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A preset with its models."""

    preset: str
    actor: TransformerConfig
    critic: TransformerConfig
    target: str
    chips: int

    @property
    def config(self) -> rlhf.Config:
        """Return the config of the preset."""
        return rlhf.PRESETS[self.preset]

    def switch(self, devices: Sequence[Any]) -> jax.stages.Lowered:
        """Lower the switch from the layout of training, in float32, to that of generation, in bfloat16."""
        mesh = self._mesh(devices)
        with jax.set_mesh(mesh):
            actor = placed(jax.eval_shape(self._create_actor), mesh)
            return rollout_model.lower(actor, config=self._rollout(mesh))

    def generate(self, devices: Sequence[Any]) -> jax.stages.Lowered:
        """Lower the generation of answers to all prompts."""
        mesh = self._mesh(devices)
        rollout = self._rollout(mesh)
        with jax.set_mesh(mesh):
            types = jax.eval_shape(lambda: rollout_model(self._create_actor(), rollout))
            with use_rules(rollout.rules):
                model = placed(types, mesh)
            shape = self.config.policy.batch_size, self.config.prompt_length
            types = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool_)]
            prompts, mask = placed_rows(types, mesh)

            def answers(model: Any, prompts: Any, mask: Any, key: Any) -> Any:
                given = (model, prompts, rollout.sampling)
                return decode(*given, attention_mask=mask, key=key, log_probs=True)

            key = jax.eval_shape(lambda: jax.random.key(0))
            return jax.jit(answers).lower(model, prompts, mask, key)

    def score(self, devices: Sequence[Any]) -> jax.stages.Lowered:
        """Lower the log-probabilities of a minibatch of answers under the reference model, in bfloat16."""
        mesh = self._mesh(devices)
        with jax.set_mesh(mesh):
            reference = jax.eval_shape(lambda: _in_bfloat16(merge_lora(self._create_actor())))
            rows, response = placed_rows(self._experience(), mesh), self.config.response_length
            said = jax.jit(
                lambda model, tokens, mask: response_log_probs(model, tokens, mask, response)
            )
            return said.lower(placed(reference, mesh), rows.tokens, rows.mask)

    def learn(self, devices: Sequence[Any]) -> jax.stages.Lowered:
        """Lower an update of the actor from a minibatch."""
        loss = functools.partial(actor_loss, config=self.config.ppo)
        trainable = is_adapter if self.config.lora_rank else None
        return self._update(devices, self._create_actor, loss, trainable)

    def learn_values(self, devices: Sequence[Any]) -> jax.stages.Lowered:
        """Lower an update of the critic from a minibatch."""
        loss = functools.partial(critic_loss, config=self.config.ppo)
        value = ClassHead(num_classes=1, name="value", pool="none", bias=False)
        config = dataclasses.replace(self.critic, heads=(value,))
        return self._update(devices, lambda: self._model(config), loss)

    def _mesh(self, devices: Sequence[Any]) -> Mesh:
        return self.config.mesh.build(devices[: self.chips])

    def _model(self, model: TransformerConfig) -> Transformer:
        config = dataclasses.replace(model, dtype="bfloat16", remat="full")
        return Transformer(config, rngs=nnx.Rngs(0))

    def _create_actor(self) -> Transformer:
        model, rank = self._model(self.actor), self.config.lora_rank
        return add_lora(model, rank=rank, key=jax.random.key(0)) if rank else model

    def _rollout(self, mesh: Mesh) -> RolloutConfig:
        sampling = SamplingConfig(
            max_new_tokens=self.config.response_length, stop_token_ids=(2,), pad_token_id=1
        )
        return RolloutConfig(sampling=sampling, prepare=_in_bfloat16, mesh=mesh)

    def _update(
        self,
        devices: Sequence[Any],
        create: Callable[[], Transformer],
        loss: Callable[..., Any],
        trainable: Any = None,
    ) -> jax.stages.Lowered:
        optimizer = AdamWConfig(b2=0.95, weight_decay=0.0).build(1e-6)
        step = make_train_step(loss, optimizer, clip=Clip(1.0), trainable=trainable)
        key = jax.random.key(0)
        begin = lambda: create_train_state(create(), optimizer, key=key, trainable=trainable)
        return lower_step(step, begin, self._experience(), self._mesh(devices))

    def _experience(self) -> Experience:
        """Return the types of a minibatch."""
        count = self.config.policy.batch_size // self.config.minibatches
        whole, answer = (count, self.config.total_length), (count, self.config.response_length)
        types: list[Any] = [
            jax.ShapeDtypeStruct(whole, jnp.int32),
            jax.ShapeDtypeStruct(whole, jnp.bool_),
            jax.ShapeDtypeStruct(answer, jnp.bool_),
            *[jax.ShapeDtypeStruct(answer, jnp.float32)] * 4,
        ]
        return Experience(*types)


def _in_bfloat16(model: Transformer) -> Transformer:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)


OPT_350M = opt(num_layers=24, d_model=1024, num_heads=16, d_embed=512, post_norm=True)
BLOOM_560M = bloom(num_layers=24, d_model=1024, num_heads=16)

CASES = (
    Case(
        preset="opt-1.3b",
        actor=opt(num_layers=24, d_model=2048, num_heads=32),
        critic=OPT_350M,
        target="h100",
        chips=1,
    ),
    Case(
        preset="bloom-7b1",
        actor=bloom(num_layers=30, d_model=4096, num_heads=32),
        critic=BLOOM_560M,
        target="v5p",
        chips=8,
    ),
    Case(
        preset="opt-66b",
        actor=opt(num_layers=64, d_model=9216, num_heads=72),
        critic=OPT_350M,
        target="v5p-64",
        chips=64,
    ),
    Case(
        preset="bloom-176b",
        actor=bloom(num_layers=70, d_model=14336, num_heads=112),
        critic=BLOOM_560M,
        target="v5p-512",
        chips=512,
    ),
)

PHASES = {
    "switch of layouts": Case.switch,
    "generation": Case.generate,
    "reference": Case.score,
    "update of the actor": Case.learn,
    "update of the critic": Case.learn_values,
}


def programs() -> list[Program]:
    """Return each phase of each case."""
    return [
        Program(
            name=f"{case.preset}, {phase}",
            lower=functools.partial(lower, case),
            targets=(case.target,),
        )
        for case in CASES
        for phase, lower in PHASES.items()
    ]
