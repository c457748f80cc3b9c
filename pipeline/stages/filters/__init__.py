"""Filters that select the visible samples of a snapshot, each with its paper's defaults."""
