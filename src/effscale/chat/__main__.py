"""``python -m effscale.chat``."""

from effscale.chat.terminal import main

if __name__ == "__main__":
    main()
