"""The run directory of a job: files written atomically, hidden states, processes, memory, provenance."""
