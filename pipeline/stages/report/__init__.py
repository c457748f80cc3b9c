"""Reports of a snapshot: statistics and one HTML page."""
