"""One condition from spec to scored cells."""
