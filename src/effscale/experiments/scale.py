"""The former name of ``effscale.plan``."""

from effscale.plan.experiment import main

if __name__ == "__main__":
    main()
