"""Runners: each begins and ends jobs of one kind, and none knows another."""
