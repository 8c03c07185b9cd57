"""Models as files: where they come from, their weights, adapters and sizes."""
