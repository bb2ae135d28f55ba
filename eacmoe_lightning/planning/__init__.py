"""What a run will cost, computed before it starts, and the checks that `fit` itself makes."""
