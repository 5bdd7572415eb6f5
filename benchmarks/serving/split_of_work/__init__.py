"""Three ways to split a student's work between Triton models (python -m benchmarks.serving.split_of_work.compare)."""
