"""Ways of hiding facts and asking for them, one module per family. Each draws a ``Question``; none knows a model."""
