"""What the client costs, and how much of a server it leaves unused: ratios to something measured in the same run."""
