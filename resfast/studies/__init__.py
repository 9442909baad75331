"""Studies: many short trainings that differ in a few options, their ranking and their figures."""
