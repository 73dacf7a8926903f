"""What every command line has: options from a config, messages, a run folder, and tables on the screen."""
