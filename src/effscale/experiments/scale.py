"""The former name of ``effscale.plan``."""

from effscale.plan import main

if __name__ == "__main__":
    main()
