"""Processes and threads: the ranks of a launch, SIGTERM, and reading ahead."""
