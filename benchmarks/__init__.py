"""Speed, measured by hand (``make bench``): ratios of sides that ran in turn."""
