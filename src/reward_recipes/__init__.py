"""Recipes that train reward models with TRL: exact, fast and with evidence."""

__version__ = "0.1.0"
