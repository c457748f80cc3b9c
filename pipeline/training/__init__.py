"""One loop for all methods: optimiser, schedule, checkpoints, evaluation beside it, the Ray Train launcher."""
