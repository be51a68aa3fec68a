"""What one GPU shows in ten minutes: `make gpu`, or `python -m tests.gpu --help`. Described in docs/gpu.md."""
