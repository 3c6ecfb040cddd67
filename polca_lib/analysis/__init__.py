"""POLCA of any training run: settings, stages, workers, plan, command line."""
