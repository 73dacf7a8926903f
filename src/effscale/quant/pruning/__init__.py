"""Pruning: weights with masks, and models made smaller by removing masked parts."""
