"""Shards to batches in a training worker: order, samples, pictures, text, batches."""
