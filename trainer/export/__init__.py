"""The trained model, for inference and in other tools' formats."""
