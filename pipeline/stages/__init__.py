"""Stages of a data job: plan, download, decode and resize, make shards, publish a snapshot."""
