"""Measurements of the teacher: training, serving parity, worth of pre-training, labelling."""
