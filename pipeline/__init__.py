"""clipmill: a distributed data and training pipeline for the CLIP family.

Data flows one way through the folders, and imports go the other way:

    shards      the format on disk: samples in tars, sidecars, snapshots
    sources     raw rows: url tables, folders, WebDataset tars, the drawn world, stamps
    stages      the work of a data job: download, decode, resize, write a shard
    loaders     shards -> batches in a training worker
    models      one method per file
    training    loop, optimiser, schedule, checkpoints, the Ray Train launcher
    evaluation  (model, data) -> metrics
    tracking    MLflow runs

Only ``jobs/`` imports all of them.
"""
