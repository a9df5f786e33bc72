"""Measuring and showing: speed, figures. Nothing else in the package imports this."""
