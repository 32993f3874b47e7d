"""What the built-in text environments share."""
