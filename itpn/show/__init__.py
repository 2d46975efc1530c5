"""Pictures from tensors and files; nothing here knows a model."""
