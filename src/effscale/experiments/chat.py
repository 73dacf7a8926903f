"""The former name of ``effscale.chat``."""

from effscale.chat.terminal import main

if __name__ == "__main__":
    main()
