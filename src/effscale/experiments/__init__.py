"""Runnable experiments: ``python -m effscale.experiments.<name>``. The only place where techniques meet."""
