"""A sweep read back from storage, and its report."""
