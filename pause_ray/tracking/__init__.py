"""MLflow as a view of storage."""
