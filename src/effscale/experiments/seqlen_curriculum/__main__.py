"""``python -m effscale.experiments.seqlen_curriculum``."""

from effscale.experiments.seqlen_curriculum.experiment import main

if __name__ == "__main__":
    main()
