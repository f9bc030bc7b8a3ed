"""Scores a checkpoint and writes reports. Imports model and data."""
