"""Few-shot adaptation of a frozen CLIP: one file per method, over any open_clip model."""
