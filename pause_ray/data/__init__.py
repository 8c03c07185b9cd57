"""From documents to packed sequences in Parquet shards."""
