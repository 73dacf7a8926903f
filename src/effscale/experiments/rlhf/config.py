"""Config and presets of the experiment ``rlhf``."""

import dataclasses
import pathlib
from typing import Annotated, Literal, get_args

from effscale.command.folder import OUTPUT, OutputPart
from effscale.models import TransformerConfig, gpt2
from effscale.models.config import Remat
from effscale.options import (
    Bounds,
    NonNegativeFloat,
    NonNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
    ProperFraction,
    check,
)
from effscale.parallel import MeshConfig
from effscale.rlhf.config import DEEPSPEED_CHAT, GroupConfig, PPOConfig

SMOLLM2 = pathlib.Path("smollm2")
"""The name of the model from ``make assets`` for --actor."""
Step = Literal["base", "sft", "reward", "ppo", "grpo", "rloo", "dpo"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningConfig(Options):
    """Training options of one step of the experiment."""

    steps: PositiveInt = 100
    """Optimizer steps; for PPO, GRPO and RLOO, iterations."""
    batch_size: PositiveInt = 32
    """Rows, pairs or prompts per batch."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate; it warms up over a tenth of the steps and decays along a cosine to a tenth."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Options):
    """A small GPT-2; the vocabulary is the tokenizer's."""

    num_layers: int = 2
    """Number of layers."""
    d_model: int = 128
    """Width of the residual stream."""
    num_heads: int = 4
    """Number of attention heads."""
    dropout: float = 0.0
    """Dropout rate of embeddings, attention and residuals while training on text and pairs; policies train without dropout."""
    init_std: float = 0.088
    """Standard deviation of the initial weights. 0.02 suits wider models; a reward model based on a Llama of this width learned faster with 0.088 (one run each)."""

    def build(self, vocab_size: int, max_length: int) -> TransformerConfig:
        """Return the config of the transformer."""
        config = gpt2(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads,
            vocab_size=vocab_size,
            max_length=max_length,
            dropout=self.dropout,
        )
        return dataclasses.replace(config, init_std=self.init_std)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OutputPart):
    """Options of a run; every field is a command-line option."""

    step: Annotated[tuple[Step, ...], Bounds(at_least=1)] = ("base", "sft", "reward", "ppo")
    """Steps to run, in this order. A step that is left out is loaded from --out, or replaced by --actor."""
    actor: pathlib.Path | None = None
    """Folder or GGUF file of a model to start from, with its tokenizer; smollm2 means SmolLM2-135M-Instruct from `make assets`.
    By default, a small GPT-2 is created and first pretrained on the source of the standard library."""
    reward: pathlib.Path | None = None
    """Folder of a reward model that reads the actor's tokens, to use instead of the step reward."""
    data: Annotated[tuple[str, ...], Bounds(at_least=1)] = ("stdlib",)
    """Sources of records: stdlib, from the docstrings of the running Python; preferences, 300 conversations from `make assets`; or JSON, JSON Lines or Parquet files in any of the known formats."""
    held_out: Annotated[float, Bounds(above=0, below=1)] = 0.1
    """Fraction of the records that is held out; for stdlib, of the functions and classes."""
    rejected: PositiveInt = 12
    """Number of comparisons per function and class of stdlib for the reward model, each with a different rejected response."""
    split: str = "all"
    """Records of each step: all trains sft, reward and ppo on all records that are not held out.
    Three shares divide these records between them instead, like 2,4,4, DeepSpeed-Chat's default for --data_split."""
    seeds: PositiveInt = 3
    """Number of runs. Seeds 0, 1, ... decide everything random."""
    model: ModelConfig = ModelConfig()
    """The GPT-2 that is created if no --actor is given."""
    vocab_size: Annotated[int, Bounds(at_least=257)] = 1024
    """Vocabulary size of the created GPT-2's tokenizer, a byte-level BPE."""
    length: PositiveInt = 128
    """Sequence length of base and sft: tokens per row."""
    prompt_length: Annotated[int, Bounds(at_least=2)] = 64
    """Maximum number of tokens per prompt; longer prompts are left out and counted."""
    response_length: PositiveInt = 32
    """Maximum number of new tokens per response."""
    min_response_length: NonNegativeInt = 8
    """Minimum number of new tokens per response. A reward model that has never seen an empty answer may prefer one."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation; trained parameters are stored in float32."""
    remat: Remat = "dots"
    """What backward passes recompute instead of storing it; full needs the least memory."""
    offload: bool = False
    """Keep the reference model and the reward model in host memory while they are not used."""
    mesh: MeshConfig = MeshConfig()
    """Device mesh. Policies generate with weights that are replicated along fsdp and sharded along tensor."""
    lora_rank: NonNegativeInt = 0
    """Rank of LoRA pairs to train instead of the weights; 0 trains the weights. Models are saved with the pairs merged."""
    base: LearningConfig = LearningConfig(steps=400, batch_size=16, learning_rate=4e-3)
    """Pretraining on the source of the standard library, without held-out docstrings."""
    sft: LearningConfig = LearningConfig(steps=150, batch_size=16, learning_rate=2e-3)
    """Supervised fine-tuning on chosen responses."""
    reward_model: LearningConfig = LearningConfig(steps=937, batch_size=64, learning_rate=3e-3)
    """Training of the reward model, which is initialized from the fine-tuned model."""
    reward_form: Literal["response", "token"] = "token"
    """Whether the reward model compares the scores at the ends of both responses, or those after each token, as DeepSpeed-Chat does."""
    reward_lm_coef: NonNegativeFloat = 0.5
    """Weight of the chosen response's cross entropy in the reward model's loss; DeepSpeed-Chat does not use this."""
    policy: LearningConfig = LearningConfig(steps=150, batch_size=64, learning_rate=5e-4)
    """Training of PPO, GRPO, RLOO and DPO; batch_size is the number of prompts per iteration."""
    critic_rate: PositiveFloat = 1e-3
    """Peak learning rate of the critic, which is initialized from the reward model."""
    ppo: PPOConfig = PPOConfig(kl_coef=0.25, value_clip=None, missing_end_penalty=1.0)
    """Options of PPO; ordinary text, for pretraining_coef, is the source of the standard library. Values are not clipped, because scores vary by far more than 0.2.
    The KL coefficient is fixed: an adaptive one fell while the policy had hardly moved, and then the policy diverged from the reference model (seed 1)."""
    group: GroupConfig = GroupConfig(group_size=4, missing_end_penalty=1.0)
    """Options of GRPO and RLOO."""
    ema_decay: ProperFraction | None = None
    """Decay of a moving average of the policy's weights, such as 0.992; the averaged policy is saved next to the policy, as model-ema. The default keeps no average."""
    epochs: PositiveInt = 1
    """Number of passes over each batch of responses."""
    minibatches: PositiveInt = 4
    """Number of updates per epoch."""
    beta: PositiveFloat = 0.1
    """Strength of DPO's penalty for moving away from the reference model."""
    samples: NonNegativeInt = 6
    """Number of conversations in the report, before and after training."""
    eval_prompts: PositiveInt = 128
    """Maximum number of held-out prompts for comparing policies."""
    eval_every: PositiveInt = 20
    """Iterations between evaluations on held-out prompts, and between checkpoints."""

    def __post_init__(self):
        super().__post_init__()
        order = [name for name in get_args(Step) if name in self.step]
        check(self, list(self.step) == order, "step", f"different steps in the order {order}")
        check(
            self,
            not (self.actor and "base" in self.step),
            "step",
            "steps without base if --actor is given",
        )
        check(
            self,
            not (self.reward and "reward" in self.step),
            "step",
            "steps without reward if --reward is given",
        )
        shortest, longest = self.min_response_length, self.response_length
        wanted = f"from 0 to response_length={longest}"
        check(self, shortest <= longest, "min_response_length", wanted)
        rows = self.policy.batch_size
        divisor = f"a divisor of policy.batch_size={rows}"
        check(self, rows % self.minibatches == 0, "minibatches", divisor)
        self.model.build(self.vocab_size, self.max_length)  # raises for an invalid model
        shares = self.split == "all" or len(self.split.split(",")) == 3
        check(self, shares, "split", "three numbers such as 2,4,4, or all")

    def learning(self, step: Step) -> LearningConfig:
        """Return the training options of a step."""
        own = {"base": self.base, "sft": self.sft, "reward": self.reward_model}
        return own.get(step, self.policy)

    def learned_by(self, step: Step) -> PPOConfig | GroupConfig:
        """Return the options of a step for learning from responses and scores."""
        if step == "ppo":
            return self.ppo
        if step == "grpo":
            return self.group
        return dataclasses.replace(
            self.group, advantage="leave_one_out", kl_in="reward", kl_estimator="k1"
        )

    @property
    def max_length(self) -> int:
        """Maximum sequence length of a model created here."""
        return max(self.length, self.total_length)

    @property
    def total_length(self) -> int:
        """Maximum number of tokens of a prompt with its response."""
        return self.prompt_length + self.response_length


_TINY = LearningConfig(steps=6, batch_size=8, learning_rate=1e-3)

PRESETS = {
    "smoke": Config(
        seeds=1,
        model=ModelConfig(num_layers=1, d_model=32, num_heads=2),
        vocab_size=512,
        prompt_length=64,
        response_length=8,
        min_response_length=2,
        base=_TINY,
        sft=_TINY,
        reward_model=_TINY,
        policy=dataclasses.replace(_TINY, steps=2, batch_size=16),
        minibatches=2,
        eval_prompts=8,
        eval_every=2,
        samples=2,
    ),
    "default": Config(),
}
PRESETS["tiny"] = PRESETS["default"]
PRESETS["smollm2-135m"] = Config(
    step=("sft", "reward", "ppo"),
    actor=SMOLLM2,
    data=("preferences",),
    held_out=0.3,
    seeds=1,
    lora_rank=16,
    length=512,
    prompt_length=192,
    response_length=64,
    min_response_length=1,
    sft=LearningConfig(steps=20, batch_size=4, learning_rate=1e-3),
    reward_model=LearningConfig(steps=30, batch_size=8, learning_rate=3e-5),
    reward_form="response",
    reward_lm_coef=0.0,
    policy=LearningConfig(steps=15, batch_size=16, learning_rate=3e-4),
    critic_rate=1e-5,
    ppo=PPOConfig(kl_coef=0.05, value_clip=None),
    minibatches=2,
    eval_prompts=32,
    eval_every=5,
    samples=3,
)

PRESETS["paper"] = PRESETS["opt-1.3b"] = Config(
    step=("sft", "reward", "ppo"),
    split="2,4,4",
    rejected=1,
    seeds=1,
    lora_rank=128,
    length=512,
    prompt_length=256,
    response_length=256,
    min_response_length=0,
    dtype="bfloat16",
    remat="full",
    sft=LearningConfig(steps=119, batch_size=128, learning_rate=1e-3),
    reward_model=LearningConfig(steps=476, batch_size=64, learning_rate=5e-5),
    reward_lm_coef=0.0,
    policy=LearningConfig(steps=953, batch_size=32, learning_rate=9.65e-6),
    critic_rate=5e-6,
    ppo=DEEPSPEED_CHAT,
    minibatches=1,
)
"""DeepSpeed-Chat's sizes, steps and learning rates for OPT-1.3B on one GPU and the 76,256 records of rm-static; needs --actor and --data.
Warmup and weight decay differ from DeepSpeed-Chat, and the original's reward model is an OPT-350M: to use one, set --reward and --step sft
ppo."""
_LARGE = dataclasses.replace(
    PRESETS["paper"],
    step=("sft", "ppo"),
    lora_rank=0,
    sft=LearningConfig(steps=119, batch_size=128, learning_rate=9.65e-6),
    policy=LearningConfig(steps=30, batch_size=1024, learning_rate=9.65e-6),
)
PRESETS["bloom-7b1"] = dataclasses.replace(_LARGE, mesh=MeshConfig(fsdp=8), minibatches=4)
"""The same for BLOOM-7B1 on 8 chips, in batches of 1,024 prompts, with an existing reward model; needs --actor, --data and --reward."""
PRESETS["opt-66b"] = dataclasses.replace(_LARGE, mesh=MeshConfig(fsdp=8, tensor=8), minibatches=8)
"""The same for OPT-66B on 64 chips. This preset and the next are only for compilation: the experiment runs in one process, and such a machine
has several hosts."""
PRESETS["bloom-176b"] = dataclasses.replace(
    _LARGE, mesh=MeshConfig(fsdp=64, tensor=8), minibatches=2
)
"""The same for BLOOM on 512 chips. ``benchmarks.aot.rlhf`` compiles these."""

FREE = ("step", "seeds", *OUTPUT, "mesh", "offload")
"""Fields that can change when a run is resumed."""
