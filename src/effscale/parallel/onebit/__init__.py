"""The mean over workers in one bit per number with error feedback: the network exchange, and the errors that workers keep."""
