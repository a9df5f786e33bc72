"""What a run leaves: tables, drawings, metrics."""
