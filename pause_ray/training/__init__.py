"""Fine-tuning with Ray Train and DeepSpeed: from shards to an adapter."""
