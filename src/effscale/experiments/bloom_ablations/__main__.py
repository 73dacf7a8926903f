"""``python -m effscale.experiments.bloom_ablations``."""

from effscale.experiments.bloom_ablations.experiment import main

if __name__ == "__main__":
    main()
