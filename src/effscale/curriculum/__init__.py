"""Curriculum learning: which samples are drawn when, and at what length."""
