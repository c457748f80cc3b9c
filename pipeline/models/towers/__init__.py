"""Image and text towers that several methods share; all come from libraries."""
