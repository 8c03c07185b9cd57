"""Packed rows become a checkpoint."""
