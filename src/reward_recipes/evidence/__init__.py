"""How RESULTS.md and the benchmark come about: runs by plan, what they show together, and speed beside stock TRL."""
