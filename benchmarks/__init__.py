"""What a run that has nothing to do costs, and what the gateway costs: ratios to something measured in the same run."""
