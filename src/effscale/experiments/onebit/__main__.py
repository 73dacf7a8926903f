"""``python -m effscale.experiments.onebit``."""

from effscale.experiments.onebit.experiment import main

if __name__ == "__main__":
    main()
