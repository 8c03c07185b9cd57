"""Documents become packed training rows on storage."""
