"""``python -m effscale.experiments.chat``."""

from effscale.experiments.chat.terminal import main

if __name__ == "__main__":
    main()
