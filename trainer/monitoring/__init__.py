"""What a run reports of itself: metrics, time and traces."""
