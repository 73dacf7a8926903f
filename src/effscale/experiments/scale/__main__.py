"""``python -m effscale.experiments.scale``."""

from effscale.experiments.scale.experiment import main

if __name__ == "__main__":
    main()
