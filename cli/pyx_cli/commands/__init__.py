"""What each command does: one module a family, imported when one of its commands runs."""
