"""``python -m effscale.experiments.xtc``."""

from effscale.experiments.xtc.experiment import main

if __name__ == "__main__":
    main()
