"""Compile a training step of a large model for a machine you do not have: its memory and traffic, and an estimate of its speed."""
