"""Whole workflows that jobs call; the top layer, which may import every other folder."""
