"""Measurements of the A/B router and report: overhead, calibration of the statistics, power."""
