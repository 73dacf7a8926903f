"""What several experiments use: configs, data, models, runs, results and plots."""
