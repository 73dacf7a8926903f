"""``python -m effscale.experiments.zeroquant``."""

from effscale.experiments.zeroquant.experiment import main

if __name__ == "__main__":
    main()
