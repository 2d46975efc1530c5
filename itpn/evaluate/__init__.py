"""Evaluation: a model's features or predictions and a data set in, numbers out."""
