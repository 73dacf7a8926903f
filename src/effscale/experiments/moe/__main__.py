"""``python -m effscale.experiments.moe``."""

from effscale.experiments.moe.experiment import main

if __name__ == "__main__":
    main()
