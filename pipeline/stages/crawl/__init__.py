"""Fetch bodies from the open web or from stores, and turn them into images that shards hold."""
