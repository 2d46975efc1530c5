"""Fine-tuning heads."""
