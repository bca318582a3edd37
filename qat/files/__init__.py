"""Folders written whole and read safely. The ground floor: imports nothing of this project."""
