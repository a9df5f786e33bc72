"""Measurements on drawn products: the tables about the built-in CLIP."""
