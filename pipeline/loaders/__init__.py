"""Shards to batches in a training worker: order, samples, images, text, batches."""
