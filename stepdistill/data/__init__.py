"""Data: where pictures and captions come from, and the cache of what a teacher makes of them."""
