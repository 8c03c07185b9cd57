"""Many trials from one file."""
