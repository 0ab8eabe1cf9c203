"""Simulated studies with known truth, and how often conclusions about them are right."""
