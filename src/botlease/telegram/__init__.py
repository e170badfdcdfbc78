"""What is particular to Telegram: the Bot API simulator for tests and demos."""
