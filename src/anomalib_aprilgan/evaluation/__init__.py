"""Comparing models: cells, the same images for all, tables. Nothing but the demo imports this."""
