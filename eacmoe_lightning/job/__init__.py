"""The Lightning job: the modules, what is trained, the data module and checkpoints."""
