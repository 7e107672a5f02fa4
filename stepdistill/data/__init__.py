"""Data: sources of images and captions, and the cache of their latents and conditions."""
