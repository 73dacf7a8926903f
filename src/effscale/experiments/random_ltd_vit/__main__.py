"""``python -m effscale.experiments.random_ltd_vit``."""

from effscale.experiments.random_ltd_vit.experiment import main

if __name__ == "__main__":
    main()
