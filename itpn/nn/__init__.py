"""The model: backbone and pyramid. Imports nothing of ours but the error class."""
