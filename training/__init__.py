"""Clicks and judgements in, checkpoints out: teacher, students, baseline, evaluation."""
