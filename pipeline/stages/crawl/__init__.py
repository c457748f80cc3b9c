"""Download images from the web or from stores, and convert them to the images of shards."""
