"""The steps: modules with a function `run(setting)` that raises where something is wrong, and records figures."""
