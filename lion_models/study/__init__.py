"""Many runs as one: grids and comparisons of trials, their tables and pictures."""
