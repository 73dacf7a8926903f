"""``python -m effscale.experiments.data_efficiency``."""

from effscale.experiments.data_efficiency.experiment import main

if __name__ == "__main__":
    main()
