"""Runnable experiments: ``python -m effscale.experiments.<name>``. The only package that combines techniques."""
