"""Which experts a model selects for which text: the numbers and figures behind `analyze`."""
