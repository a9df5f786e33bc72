"""The package's own small CLIP for drawn inspection pictures: architecture, weights and how they were trained."""
