"""From what a user calls a picture to what a vision tower takes; encoded once."""
