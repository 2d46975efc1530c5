"""Integrally pre-trained transformer pyramid networks."""

__version__ = "0.1.0"
