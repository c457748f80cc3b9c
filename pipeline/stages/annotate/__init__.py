"""Sidecars: annotations of stored samples by a model or a rule, beside the tars."""
