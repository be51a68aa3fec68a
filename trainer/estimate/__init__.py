"""What a run costs, computed before its first step."""
