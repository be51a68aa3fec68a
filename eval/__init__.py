"""Job 3: show what a trained model is worth."""
