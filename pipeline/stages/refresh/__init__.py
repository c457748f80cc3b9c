"""A source becomes a snapshot, and a snapshot becomes its successor."""
