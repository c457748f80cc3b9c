"""Extractors of nouns, verbs and noun phrases, found by the names of their modules."""
