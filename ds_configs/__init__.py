"""DeepSpeed configurations, which `unimo3.training.engine` reads."""
