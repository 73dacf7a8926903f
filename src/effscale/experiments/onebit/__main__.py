"""``python -m effscale.experiments.onebit``."""

from effscale.experiments.onebit import main

if __name__ == "__main__":
    main()
