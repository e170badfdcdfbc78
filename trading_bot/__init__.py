"""A small, honest paper-trading bot for Telegram: the bot that the scripts at the root guard.

No real money, no exchange: prices come from a seeded random walk unless PRICE_URL names a source. What is
real is the care for orders: each is written with the term under which it was placed, and the database
refuses it when the term is stale or when the same message was already turned into an order.
"""
