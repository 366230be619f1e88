"""Real members, agents, shims and jobs under a nemesis that kills and stops them at any moment.

``python -m tests.chaos --kills 20000`` runs it; the report is one JSON object. Nothing in the
product knows of it: the failpoints and the mutants are put in place here, around product functions,
in the processes that a run starts.

Two state directories ("boxes") share one folder of GPU locks, as two containers do: so these locks
alone keep their jobs apart. Who is on a GPU is witnessed from outside, by the jobs themselves.
"""
