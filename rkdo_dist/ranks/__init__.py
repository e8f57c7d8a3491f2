"""The process and its peers: who is here, what they agree on, what they say to people, how they stop."""
