"""The wiring diagrams, one per task: from a recipe to model, data, objective and evaluation."""
