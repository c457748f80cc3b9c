"""Kinds of evaluation: one file each, found by name; see ``pipeline/evaluation/task.py``."""
