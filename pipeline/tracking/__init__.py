"""MLflow: the life of a run, what it is made from, its metrics, figures and checkpoints."""
