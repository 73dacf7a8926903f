"""``python -m effscale.experiments.finetune``."""

from effscale.experiments.finetune.experiment import main

if __name__ == "__main__":
    main()
