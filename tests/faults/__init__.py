"""Faults injected into real processes: what they are, how they are started, and the runs that must survive them."""
