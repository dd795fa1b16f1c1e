"""Network drivers: base.py says what one is."""
