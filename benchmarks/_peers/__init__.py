"""What ``benchmarks/peers.py`` holds side by side: one adapter for each program, ours among them.

Each adapter does what a user of that program would do at a terminal, with its settings as they
come; nothing here knows how a program works inside.
"""
