"""Images that are optimised for a text: differentiable strokes, the loop, and the methods."""
