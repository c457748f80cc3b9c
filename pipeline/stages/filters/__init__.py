"""Cleaning: filters that decide which samples of a snapshot readers see, each with its paper's numbers."""
