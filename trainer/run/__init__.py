"""Where a run is kept, who trains it, and how its ranks stop together."""
