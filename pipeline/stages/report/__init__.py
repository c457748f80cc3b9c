"""What a snapshot holds, as numbers and as one HTML page."""
