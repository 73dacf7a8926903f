"""Code shared by several experiments: configs, data, models, runs, results and plots."""
