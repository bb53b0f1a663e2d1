"""What a format costs in quality, and weights chosen by a text."""
