"""Evaluation of trained models: retrieval, classification, probes, robustness, and reports that compare models."""
