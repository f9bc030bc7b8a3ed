"""The training loop and what it needs. Imports model and data."""
