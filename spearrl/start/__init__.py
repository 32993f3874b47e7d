"""How a run begins: the model it starts from, and its cold start."""
