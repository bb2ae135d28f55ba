"""The commands of the command line: `fit` and its evaluations (Lightning), `plan`, `analyze`, `study` and `prune`."""
