"""The run directory of a job: files that are whole or absent, hidden states, processes, memory, provenance."""
