"""Sidecars: what a model or a rule says of stored samples, beside the tars."""
