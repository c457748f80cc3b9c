"""AudioCLIP: extending CLIP to image, text and audio (arXiv 2106.13043)."""
