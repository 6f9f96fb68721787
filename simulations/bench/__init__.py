"""Measurements the project makes of itself."""
