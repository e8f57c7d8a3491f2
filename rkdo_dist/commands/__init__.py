"""The commands, by groups: arguments, help and calls."""
