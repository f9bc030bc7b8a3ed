"""Text in, packed token batches out. Imports nothing of this project."""
