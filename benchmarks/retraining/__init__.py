"""Parts of benchmarks/loop.py: who searches what in each round, the days that are served, what the watch sees."""
