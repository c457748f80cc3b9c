"""Methods that optimise images; each module is one, found by its name."""
