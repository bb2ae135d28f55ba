"""The cost of a run, estimated before it starts, and the checks that `fit` makes."""
