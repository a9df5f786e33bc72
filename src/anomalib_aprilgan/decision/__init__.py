"""From raw predictions to decisions."""
