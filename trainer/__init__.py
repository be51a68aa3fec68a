"""Job 2: train image and text towers with DeepSpeed; the third tower is rows read from a cache."""
