"""``python -m effscale.experiments.random_ltd_bert``."""

from effscale.experiments.random_ltd_bert.experiment import main

if __name__ == "__main__":
    main()
