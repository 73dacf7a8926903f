"""effscale: train and serve large transformers with less data, communication, bits and active parameters.

Import the pieces from their subpackages (``effscale.models``, ``effscale.training``, ...); this module
holds only the version, so that importing it costs nothing.
"""

__version__ = "0.1.0"
