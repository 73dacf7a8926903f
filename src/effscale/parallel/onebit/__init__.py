"""The mean of workers in one bit per number, with the error kept: what crosses the network, and what each worker owes."""
