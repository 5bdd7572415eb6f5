"""Measurements of students: quality by recipe, training speed."""
