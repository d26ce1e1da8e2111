"""A checkpoint made to fit: what a budget leaves for the linears, and the best way to spend it."""
