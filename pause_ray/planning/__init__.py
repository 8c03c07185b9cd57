"""Forecasts of sweeps and checks of clusters, before anything starts."""
