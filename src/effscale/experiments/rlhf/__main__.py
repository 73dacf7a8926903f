"""``python -m effscale.experiments.rlhf``."""

from effscale.experiments.rlhf.experiment import main

if __name__ == "__main__":
    main()
