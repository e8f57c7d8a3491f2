"""Studies: tables, figures and reports of finished runs, and commands that start many runs."""
