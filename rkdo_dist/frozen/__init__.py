"""What frozen features tell: clusters and maps of them, and how good supervisors they make."""
