"""Load tests: what `locust -f loadtest/` runs."""
