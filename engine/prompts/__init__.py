"""From messages to token ids with places for pictures, and back to text."""
