"""``python -m effscale.experiments.quickstart``."""

from effscale.experiments.quickstart.experiment import main

if __name__ == "__main__":
    main()
