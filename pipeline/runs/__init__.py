"""Whole workflows that jobs call; the top floor, which may import every other folder."""
