"""MLflow: the life cycle of a run, its provenance, metrics, figures and checkpoints."""
