"""Measurements of the metrics and of the click log's preparation."""
