"""Scores of any checkpoint, rankers compared on judged documents, the table of results, calibration."""
