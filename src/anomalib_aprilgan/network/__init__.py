"""The network: from images to raw scores and maps."""
