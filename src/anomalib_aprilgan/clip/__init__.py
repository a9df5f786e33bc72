"""The frozen CLIP: architecture, towers, weights and prompts."""
