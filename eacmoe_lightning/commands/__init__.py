"""What the command line runs: `fit` and its evaluations (Lightning), `plan`, `analyze`, `study`, `prune`."""
