"""Clicks and judgments in, checkpoints out: teacher, students, baseline, evaluation."""
