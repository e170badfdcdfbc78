"""At most one copy of your bot works at any time."""
