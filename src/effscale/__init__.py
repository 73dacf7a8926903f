"""effscale: train and serve large transformers with less data, communication, bits and active parameters.

Import what you need from the subpackages (``effscale.models``, ``effscale.training``, ...). This module
defines only the version, so importing it is cheap.
"""

__version__ = "0.1.0"
