"""Measures what distillation gained and lost: quality and latency by number of steps, under named protocols."""
