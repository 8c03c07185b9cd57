"""Ways to get text from a model."""
