"""Make a snapshot from a source, and refresh a snapshot."""
