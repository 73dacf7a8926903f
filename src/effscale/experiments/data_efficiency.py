"""A GPT is pretrained with less data: curriculum learning, random-LTD, and both, against plain training.

Each technique trains on the whole budget of tokens and on parts of it, over several seeds. A budget is of layer-averaged
tokens: those that a layer processes, averaged over the layers. So a technique that shows the model short rows or drops
tokens makes more steps of the same budget. Validation is on all tokens of whole rows. What is compared is the loss at the end,
and the data, operations and time that each needs to reach the loss of plain training.

Every technique gets the same care: its learning rate warms up by steps, and a search by the same rule, with a seed that is not
compared, finds its peak and the length of its warmup.

    python -m effscale.experiments.data_efficiency
    python -m effscale.experiments.data_efficiency --techniques none ltd --fractions 1.0 0.67 --seeds 5
    python -m effscale.experiments.data_efficiency --out runs/mine --resume

Source: Li et al., "DeepSpeed Data Efficiency", 2022 (arXiv:2212.03597), section 4.1.
"""

import dataclasses
import pathlib
import time

import numpy as np

from effscale.experiments import quickstart
from effscale.experiments.cli import messages, parse
from effscale.experiments.console import status
from effscale.experiments.host import keep_freed_memory
from effscale.experiments.prepared import check_folder, corpus_digests, resumable
from effscale.experiments.pretraining_plan import DataEfficiencyConfig, Technique
from effscale.experiments.quickstart import ModelConfig
from effscale.experiments.results import Result, finish
from effscale.experiments.search import Point, Search
from effscale.models.validation import check, check_finite
from effscale.parallel import MeshConfig, shard_batch
from effscale.training import AdamWConfig
from effscale.user_cache import cache_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the run does; every field is an option of the command line."""

    techniques: tuple[Technique, ...] = ("none", "cl", "ltd", "cl_ltd")
    """What is compared; none, plain training, must be among them."""
    fractions: tuple[float, ...] = (1.0, 0.67, 0.5)
    """Parts of the budget of tokens; 1 must be among them."""
    seeds: int = 3
    """Runs of each; seeds 0, 1, ... decide the initial weights, the order of rows and which tokens are dropped."""
    efficiency: DataEfficiencyConfig = DataEfficiencyConfig()
    """The schedules of the techniques."""
    corpus: str = "stdlib"
    """A source: stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field, hf:NAME_OR_FOLDER#field."""
    vocab_size: int = 1024
    """Size of the byte-level BPE that is trained on the corpus."""
    tokenizer: pathlib.Path | None = None
    """A tokenizer.json, or its folder, to use instead of training one."""
    validation_fraction: float = 0.03
    """Share of the documents that is held out."""
    length: int = 256
    """Tokens in a row, and positions of the model."""
    batch_size: int = 8
    """Rows in a batch, over all devices."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into, to save memory."""
    steps: int = 400
    """Steps of plain training on the whole budget, which is so many full batches."""
    model: ModelConfig = ModelConfig(num_layers=6, d_model=128, num_heads=4, remat="none")
    """The model."""
    learning_rate: float = 4.5e-3
    """Peak of the schedule, where the search starts: a linear warmup by steps, then a cosine by layer-averaged tokens."""
    final_learning_rate: float | None = None
    """End of the schedule; None takes a tenth of the peak."""
    warmup: int = 160
    """Steps of the warmup, where the search starts; on a part of the budget, that part of what it finds."""
    search: Search = Search()
    """How each technique's learning rate and warmup are searched for, on the whole budget."""
    optimizer: AdamWConfig = AdamWConfig()
    """AdamW."""
    clip_norm: float = 1.0
    """Greatest norm of the gradient."""
    mesh: MeshConfig = MeshConfig()
    """How devices are laid out; -1 means the rest."""
    evaluations: int = 10
    """Evaluations of plain training on the whole budget, on a part of the held-out rows; at the end comes one on all."""
    eval_batches: int = 12
    """Batches in that part."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    out: pathlib.Path | None = None
    """Folder of the run; by default runs/data_efficiency/<time>."""
    resume: bool = False
    """Go on with the run in --out: finished runs are kept, the last one goes on from its checkpoint."""
    cache: pathlib.Path | None = None
    """Where prepared corpora are kept; by default the user's cache folder."""

    def __post_init__(self):
        check_finite(self)
        check(self, self.steps >= 1, "steps", "at least 1")
        for name in ("techniques", "fractions"):
            values = getattr(self, name)
            check(self, len(set(values)) == len(values), name, "different values")
        check(self, "none" in self.techniques, "techniques", "none and others to compare with it")
        check(
            self, all(0 < f <= 1 for f in self.fractions), "fractions", "numbers above 0, at most 1"
        )
        check(self, 1.0 in self.fractions, "fractions", "1.0 and others to compare with it")
        check(self, self.seeds >= 1, "seeds", "at least 1")
        compared = f"at least seeds={self.seeds}, so that no compared run has it"
        check(self.search, self.search.seed >= self.seeds, "seed", compared)
        check(
            self,
            1 <= self.evaluations <= self.steps,
            "evaluations",
            f"from 1 to steps={self.steps}",
        )
        resumable = not (self.resume and self.out is None)
        check(self, resumable, "resume", "given with --out, the folder to go on with")
        for technique in self.techniques:
            for fraction in self.fractions:
                self.pretraining(technique, fraction)  # an impossible run is refused here

    @property
    def start(self) -> Point:
        """Where the search begins."""
        return Point(self.learning_rate, self.warmup)

    def pretraining(
        self,
        technique: Technique,
        fraction: float,
        seed: int = 0,
        point: Point | None = None,
    ) -> quickstart.Config:
        """The config of one run; ``point`` None takes the start of the search."""
        point = point or self.start
        shared = {
            name: getattr(self, name)
            for name in (
                *(
                    "efficiency",
                    "vocab_size",
                    "tokenizer",
                    "validation_fraction",
                    "length",
                    "model",
                ),
                *(
                    "batch_size",
                    "accumulate",
                    "final_learning_rate",
                    "optimizer",
                    "clip_norm",
                ),
                *("mesh", "eval_batches", "checkpoint_every", "cache"),
            )
        }
        return quickstart.Config(
            corpus=(self.corpus,),
            technique=technique,
            steps=round(self.steps * fraction),
            learning_rate=point.learning_rate,
            warmup=round(point.warmup * fraction),
            eval_every=self.steps // self.evaluations,
            keep=1,
            samples=(),
            seed=seed,
            **shared,
        )


PRESETS = {
    "smoke": Config(
        fractions=(1.0, 0.5),
        seeds=1,
        efficiency=DataEfficiencyConfig(min_length=32, min_kept=32, granularity=32),
        vocab_size=512,
        length=64,
        batch_size=4,
        steps=32,
        warmup=4,
        search=Search(points=2),
        model=ModelConfig(num_layers=3, d_model=32, num_heads=2, remat="none"),
        evaluations=4,
        eval_batches=2,
        checkpoint_every=16,
    ),
    "default": Config(),
    # The paper's GPT-3 1.3B: 300 billion tokens in batches of 512 rows; its lengths grow by 8 and 16 tokens, these by 128.
    "paper": Config(
        efficiency=DataEfficiencyConfig(
            curriculum=110_000 / 286_102,
            min_length=80,
            dropping=200_000 / 286_102,
            min_kept=128,
            granularity=128,
        ),
        vocab_size=50257,
        length=2048,
        batch_size=512,
        accumulate=4,
        steps=286_102,
        warmup=2861,
        learning_rate=2e-4,
        search=Search(points=1),
        final_learning_rate=1e-6,
        model=ModelConfig(
            num_layers=24,
            d_model=2048,
            num_heads=16,
            dtype="bfloat16",
            remat="full",
            init_std=0.013,
        ),
        mesh=MeshConfig(fsdp=8),
        evaluations=100,
        checkpoint_every=1000,
    ),
}

FREE = ("seeds", "mesh", "out", "resume", "cache")


def run(config: Config) -> Result:
    """Trains as ``config`` says and fills the run folder.

    A run whose loss or gradient is not finite for ten steps ends there; that is a result, and the others are made.

    Args:
        config: What to do.

    Returns:
        The named figures.

    Raises:
        ValueError: If parts of the config do not fit each other or the corpus; or ``resume`` is set and the folder is of
            another config.
        FileExistsError: If ``out`` already holds a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
    """
    # Importing what only a run needs here keeps --help quick.
    from effscale.data import parse_source, prepare_corpus, save_tokenizer
    from effscale.experiments import data_efficiency_report as report
    from effscale.experiments.data_efficiency_figures import draw
    from effscale.experiments.data_efficiency_runner import Runner
    from effscale.training import RunFolder

    began = time.perf_counter()
    mesh = config.mesh.build()
    # What cannot work is refused before the corpus is prepared, and before anything is written.
    shard_batch(np.zeros(config.batch_size, np.int8), mesh)
    check_folder(config, FREE)
    with status("preparing the corpus") as progress:
        corpus = prepare_corpus(
            parse_source(config.corpus),
            config.cache or cache_folder("corpora"),
            vocab_size=None if config.tokenizer else config.vocab_size,
            tokenizer=config.tokenizer,
            validation_fraction=config.validation_fraction,
            progress=lambda p: progress(f"{p.documents:,} documents, {p.tokens:,} tokens"),
        )
    runner = Runner(config, corpus, mesh)
    folder = RunFolder.create(
        config.out,
        name="data_efficiency",
        config=config,
        data=corpus_digests([corpus]),
        resume=config.resume,
    )
    save_tokenizer(corpus.tokenizer, folder.path)
    with resumable(folder):
        found = {technique: runner.search(folder, technique) for technique in config.techniques}
        for fraction in config.fractions:
            for technique in config.techniques:
                for seed in range(config.seeds):
                    runner.run(folder, technique, fraction, seed, found[technique].best)
                runner.forget(technique, fraction)

    comparison = report.read(folder.path, config, corpus.vocab_size, found)
    figures = comparison.figures()
    draw(folder.figures, comparison)
    tables = report.tables(comparison)
    seeds = comparison.seeds()
    return finish(folder, "data_efficiency", figures, tables, seeds=seeds, began=began, left=2)


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    with messages():
        config = parse(
            PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.data_efficiency"
        )
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()
