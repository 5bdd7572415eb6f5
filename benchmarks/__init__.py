"""Side-by-side measurements; each prints a ratio, results are kept in docs/results/."""
