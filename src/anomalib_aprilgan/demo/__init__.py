"""Drawn inspection data, the small CLIP that learned from them, the quickstart, and the studies about both."""
