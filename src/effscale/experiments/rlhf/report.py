"""Results of the experiment ``rlhf``: accuracy of the reward model, rewards before and after, KL divergence and conversations."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effscale.experiments.rlhf.config import Config, Step
from effscale.experiments.rlhf.runs import Steps
from effscale.generation import decode
from effscale.models import Transformer
from effscale.rlhf import response_log_probs, response_scores
from effscale.rlhf.rollout import rollout_model
from effscale.study.table import deviation
from effscale.training import read_jsonl
from effscale.training.plotting import COLORS, STYLE, pyplot, series

POLICIES: tuple[Step, ...] = ("ppo", "grpo", "rloo", "dpo")
NAMES = {
    "base": "base model",
    "sft": "fine-tuned (SFT)",
    "reward": "reward model",
    **{step: step.upper() for step in POLICIES},
}
"""The name of each step in tables and figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """Responses of one policy to held-out prompts, and their evaluation by the other models.

    Attributes:
        scores: The reward model's score of each response.
        kl: Log-probability of each response under the policy minus that under the fine-tuned model, in nats.
        perplexity: Perplexity of all responses under the fine-tuned model.
        length: Mean number of tokens per response.
        ended: Share of responses that contain a stop token.
        texts: The responses.
    """

    scores: np.ndarray
    kl: np.ndarray
    perplexity: float
    length: float
    ended: float
    texts: Sequence[str]


def answers(steps: Steps, policy: Transformer, *, key: int = 0) -> Answers:
    """Sample a policy's answers to the held-out prompts, with the same random numbers for every policy of a seed."""
    rows = steps.held_out_prompts()
    rollout = steps.rollout()
    sampling = rollout.sampling
    prompts, mask = jnp.asarray(rows["input_ids"]), jnp.asarray(rows["attention_mask"])
    drawn = decode(
        *(rollout_model(policy, rollout), prompts, sampling),
        attention_mask=mask,
        key=jax.random.key(key),
        log_probs=True,
    )
    given = (drawn.tokens, drawn.mask, sampling.max_new_tokens, sampling.temperature)
    judged = _judge(steps.actor(), steps.reward_model(), *given)
    real = np.asarray(drawn.mask)[:, prompts.shape[1] :]
    before, scores = (np.asarray(x) for x in judged)
    mine = np.asarray(drawn.log_probs)
    tokens = np.asarray(drawn.tokens)[:, prompts.shape[1] :]
    ended = np.isin(tokens, steps.encoder.stop_token_ids) & real
    decode_text = steps.encoder.tokenizer.decode
    return Answers(
        scores=scores,
        kl=np.where(real, mine - before, 0).sum(1),
        perplexity=float(np.exp(-before[real].mean())),
        length=float(real.sum(1).mean()),
        ended=float(ended.any(1).mean()),
        texts=[
            decode_text(row[keep].tolist()).strip() for row, keep in zip(tokens, real, strict=True)
        ],
    )


@jax.jit(static_argnums=(4, 5))
def _judge(
    reference: Transformer,
    reward_model: Transformer,
    tokens: Any,
    mask: Any,
    response: int,
    temperature: float,
) -> Any:
    said = response_log_probs(reference, tokens, mask, response, temperature=temperature)
    return said.log_probs, response_scores(reward_model, tokens, mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seed:
    """Results of one seed.

    Attributes:
        accuracy: Accuracy of the reward model on held-out pairs; None if the reward model was not trained in this run.
        before: Answers of the fine-tuned model.
        after: Answers of each policy.
        seconds: Duration of each step.
    """

    accuracy: float | None
    before: Answers | None
    after: Mapping[Step, Answers]
    seconds: Mapping[str, float]


def read(steps: Steps, config: Config) -> Seed:
    """Evaluate the models of a seed and read the metrics of its steps."""
    folder = steps.folder.path / f"seed-{steps.seed}"
    metrics = folder / "reward" / "metrics.jsonl"
    accuracy = None
    if metrics.is_file():
        accuracy = float(series(read_jsonl(metrics), "val_accuracy")[1][-1])
    done = [step for step in POLICIES if (steps.place(step) / "config.json").is_file()]
    judged = config.reward is not None or (steps.place("reward") / "config.json").is_file()
    finished = sorted(folder.glob("*/done.json"))
    seconds = {
        p.parent.name: json.loads(p.read_text(encoding="utf-8"))["seconds"] for p in finished
    }
    return Seed(
        accuracy=accuracy,
        before=answers(steps, steps.actor()) if judged else None,
        after={step: answers(steps, steps.policy(step)) for step in done} if judged else {},
        seconds=seconds,
    )


def figures(seeds: Sequence[Seed]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the named figures, as means over seeds and for each seed."""
    each: dict[str, list[float]] = {}
    for seed in seeds:
        found: dict[str, float] = {}
        if seed.accuracy is not None:
            found["reward_accuracy"] = seed.accuracy
        if seed.before is not None:
            found |= _of("sft", seed.before)
            found["sft_reward_std"] = float(seed.before.scores.std())
        for step, answered in seed.after.items():
            found |= _of(step, answered)
            assert seed.before is not None
            rise = answered.scores.mean() - seed.before.scores.mean()
            found[f"{step}_rise_in_deviations"] = float(rise / seed.before.scores.std())
        for name, seconds in seed.seconds.items():
            found[f"{name}_seconds"] = seconds
        for name, value in found.items():
            each.setdefault(name, []).append(value)
    named = {name: float(np.mean(values)) for name, values in each.items()}
    first = next((step for step in POLICIES if f"{step}_kl" in named), None)
    named |= {} if first is None else {"kl_per_response": named[f"{first}_kl"]}
    return named, each


def _of(name: str, found: Answers) -> dict[str, float]:
    return {
        f"{name}_reward_mean": float(found.scores.mean()),
        f"{name}_kl": float(found.kl.mean()),
        f"{name}_perplexity": found.perplexity,
        f"{name}_length": found.length,
        f"{name}_ended": found.ended,
    }


def tables(seeds: Sequence[Seed]) -> dict[str, list[list[str]]]:
    """Return the tables for the terminal and the page."""
    rows = [["policy", "score", "KL, nats", "perplexity", "tokens", "ended by itself"]]
    policies = {"sft": [s.before for s in seeds if s.before is not None]}
    for step in POLICIES:
        policies[step] = [s.after[step] for s in seeds if step in s.after]
    for name, found in policies.items():
        if found:
            means = lambda get, found=found: np.array([get(a) for a in found])
            reward, kl = means(lambda a: a.scores.mean()), means(lambda a: a.kl.mean())
            rows.append(
                [
                    NAMES[name],
                    f"{reward.mean():.3f} ± {deviation(reward):.3f}",
                    f"{kl.mean():.2f}",
                    f"{means(lambda a: a.perplexity).mean():.1f}",
                    f"{means(lambda a: a.length).mean():.1f}",
                    f"{100 * means(lambda a: a.ended).mean():.0f} %",
                ]
            )
    names = sorted({name for seed in seeds for name in seed.seconds}, key=list(NAMES).index)
    times = [["step", "seconds"]] + [
        [NAMES[name], f"{np.mean([s.seconds[name] for s in seeds if name in s.seconds]):.0f}"]
        for name in names
    ]
    shown = {"Answers to held-out prompts": rows} if len(rows) > 1 else {}
    return shown | {"Time of each step, mean over seeds": times}


def conversations(steps: Steps, seed: Seed, count: int) -> str:
    """Format held-out prompts with the answers before and after training, as Markdown."""
    if seed.before is None or not seed.after:
        return ""
    tokens = steps.held_out_prompts()
    lines = ["## Conversations", ""]
    for i in range(min(count, len(seed.before.texts))):
        real = tokens["attention_mask"][i]
        prompt = steps.encoder.tokenizer.decode(tokens["input_ids"][i][real].tolist()).strip()
        lines += [f"**{prompt}**", ""]
        for name, found in {"sft": seed.before, **seed.after}.items():
            lines.append(f"- {name} ({found.scores[i]:+.2f}): {found.texts[i]}")
        lines.append("")
    return "\n".join(lines)


def draw(path: pathlib.Path, folder: pathlib.Path, seeds: Sequence[Seed]) -> None:
    """Draw score and KL divergence by iteration (mean and range over seeds), and scores on held-out prompts before and after."""
    done = [step for step in POLICIES if seeds and step in seeds[0].after]
    online = [step for step in done if step != "dpo"]
    if not done:
        return
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.2))
        for color, step in zip(COLORS, online, strict=False):
            files = (folder / f"seed-{n}" / step / "metrics.jsonl" for n in range(len(seeds)))
            records = [read_jsonl(file) for file in files]
            for axis, name in zip(axes[:2], ("score", "kl"), strict=True):
                x = series(records[0], name)[0]
                y = np.stack([series(of_seed, name)[1] for of_seed in records])
                axis.plot(x, y.mean(0), color=color, label=step.upper())
                axis.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.2, linewidth=0)
        axes[0].set(xlabel="iteration", ylabel="score of sampled answers")
        axes[1].set(xlabel="iteration", ylabel="KL from SFT (nats per answer)")
        everything = {NAMES["sft"]: [s.before for s in seeds if s.before is not None]}
        everything |= {step.upper(): [s.after[step] for s in seeds] for step in done}
        scores = {n: np.concatenate([a.scores for a in found]) for n, found in everything.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(scores.values())), 24)
        for color, (name, values) in zip((COLORS[-1], *COLORS), scores.items(), strict=False):
            axes[2].hist(values, edges, histtype="step", linewidth=1.5, color=color, label=name)
        axes[2].set(xlabel="score on held-out prompts", ylabel="answers")
        axes[2].legend(fontsize=8)
        if online:
            axes[0].legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
