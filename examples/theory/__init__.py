"""Section 6.2 of the paper on explicit distributions: what its lemmas and its theorem state, and what they need."""
