"""From a model to files that run without it: graphs, compression, metadata."""
