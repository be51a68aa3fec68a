"""Metrics, their intervals, and which differences are real."""
