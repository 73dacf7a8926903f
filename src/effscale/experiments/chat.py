"""The former name of ``effscale.chat``."""

from effscale.chat import main

if __name__ == "__main__":
    main()
