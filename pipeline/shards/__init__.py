"""The format on disk: samples in tar shards, sidecars joined by key, immutable snapshots."""
