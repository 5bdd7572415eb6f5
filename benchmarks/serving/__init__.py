"""Measurements of serving: students behind Triton beside other servers, latency on a GPU."""
