"""``python -m effscale.experiments.bloom``."""

from effscale.experiments.bloom.experiment import main

if __name__ == "__main__":
    main()
